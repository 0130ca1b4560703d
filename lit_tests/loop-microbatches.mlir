// RUN: bactrian-opt %s --split-stages --loop-microbatches --split-input-file | FileCheck %s

// The state's buffer goes to its next value; the accumulator starts as zeros inside; the batch is sliced in the loop, the
// state is read by every turn; the turn's number is the microbatch's; the aux of the last turn comes out.
// CHECK-LABEL: module @whole_step
// CHECK-SAME: bactrian.looped_microbatches = 4 : i64, bactrian.num_microbatches = 1 : i64
module @whole_step attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: func.func public @main(%[[W:[^:]*]]: !mpmd.mesh_tensor<"stage0", tensor<3xf32>> {bactrian.argument = 0 : i64, bactrian.role = "state"},
  // CHECK-SAME: %[[X:[^:]*]]: !mpmd.mesh_tensor<"stage0", tensor<8x3xf32>> {bactrian.argument = 1 : i64, bactrian.role = "batch"})
  // CHECK-SAME: {bactrian.result = 0 : i64, bactrian.updates = 0 : i64}
  // CHECK-NEXT: %[[R:.*]]:2 = mpmd.fragment_call<mesh="stage0", origin=["forward_backward"]> @stage0.forward_backward(%[[W]], %[[X]])
  // CHECK-NEXT: return %[[R]]#0, %[[R]]#1
  // CHECK: func.func private @stage0.forward_backward(%[[W:[^:]*]]: tensor<3xf32> {tf.aliasing_output = 0 : i32}, %[[X:[^:]*]]: tensor<8x3xf32>)
  // CHECK: %[[ZEROS:.*]] = stablehlo.constant dense<0.000000e+00> : tensor<3xf32>
  // CHECK: stablehlo.while(%[[M:[^ ]*]] = {{[^ ]*}}, %{{[^ ]*}} = %[[ZEROS]]
  // CHECK: stablehlo.constant dense<4> : tensor<i32>
  // CHECK: stablehlo.compare LT, %[[M]]
  // CHECK: do {
  // CHECK: %[[ROWS:.*]] = stablehlo.constant dense<2> : tensor<i32>
  // CHECK: %[[START:.*]] = stablehlo.multiply %[[M]], %[[ROWS]]
  // CHECK: stablehlo.dynamic_slice {{.*}}, %[[START]], {{.*}} sizes = [2, 3]
  // CHECK: stablehlo.convert %[[M]]
  // CHECK-NOT: custom_call
  // CHECK: stablehlo.return
  // CHECK: stablehlo.subtract %[[W]]
  func.func public @main(%w: tensor<3xf32> {bactrian.role = "state"}, %x: tensor<2x3xf32> {bactrian.role = "batch"}) -> (tensor<3xf32> {bactrian.updates = 0 : i64}, tensor<f32>) {
    %m = stablehlo.custom_call @bactrian.microbatch_index() {bactrian.phase = "forward", bactrian.stage = 0 : i64} : () -> tensor<i32>
    %f = stablehlo.convert %m {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<f32>
    %init = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<0.0> : tensor<f32>
    %s = stablehlo.reduce(%x init: %init) applies stablehlo.add across dimensions = [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<2x3xf32>, tensor<f32>) -> tensor<3xf32>
    %g = stablehlo.multiply %s, %w {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<3xf32>
    %zero = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 0 : i64} dense<0.0> : tensor<3xf32>
    %a = stablehlo.add %zero, %g {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<3xf32>
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%a, %f) {mhlo.backend_config =
      {kinds = "gradient,aux", reductions = "accumulated,accumulated"}} : (tensor<3xf32>, tensor<f32>) -> (tensor<3xf32>, tensor<f32>)
    %n = stablehlo.subtract %w, %b#0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<3xf32>
    return %n, %b#1 : tensor<3xf32>, tensor<f32>
  }
}

// -----

// Forward and backward are functions of their own: nothing changes.
// CHECK-LABEL: module @gpipe
// CHECK-SAME: bactrian.num_microbatches = 2 : i64
module @gpipe attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: @stage0.forward(
  // CHECK-NOT: stablehlo.while
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %g = stablehlo.negate %y {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

// CHECK-LABEL: module @two_stages
// CHECK-SAME: bactrian.num_microbatches = 2 : i64
module @two_stages attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: @stage1.forward_backward(
  // CHECK-NOT: stablehlo.while
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %g = stablehlo.negate %y {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

// A batch argument as a result is the last microbatch's.
// CHECK-LABEL: module @batch_comes_out
module @batch_comes_out attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: @stage0.forward_backward(%[[X:[^:]*]]: tensor<8xf32>) -> (tensor<4xf32>, tensor<4xf32>)
  // CHECK: stablehlo.while
  // CHECK: %[[LAST:.*]] = stablehlo.dynamic_slice %[[X]], {{.*}}, sizes = [4]
  // CHECK: return %{{.*}}, %[[LAST]]
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32>, tensor<4xf32>) {
    %g = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%g, %x) {mhlo.backend_config =
      {kinds = "gradient,aux", reductions = "accumulated,accumulated"}} : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
    return %b#0, %b#1 : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// A function without accumulators, as text that was printed and parsed again has it: no argument attributes at all.
// CHECK-LABEL: module @nothing_accumulates
module @nothing_accumulates attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: @stage0.forward_backward(%{{[^:]*}}: tensor<8xcomplex<f32>>) -> tensor<4xcomplex<f32>>
  // CHECK: stablehlo.complex
  // CHECK: stablehlo.while
  func.func public @main(%x: tensor<4xcomplex<f32>> {bactrian.role = "batch"}) -> tensor<4xcomplex<f32>> {
    %y = stablehlo.negate %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xcomplex<f32>>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "aux", reductions = "accumulated"}} : (tensor<4xcomplex<f32>>) -> tensor<4xcomplex<f32>>
    return %b : tensor<4xcomplex<f32>>
  }
}
