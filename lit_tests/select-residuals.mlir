// RUN: bactrian-opt %s --select-residuals --split-input-file | FileCheck %s

// A broadcast is larger than what it is made from: the backward phase makes it again.
// CHECK-LABEL: module @broadcast_is_no_residual
module @broadcast_is_no_residual attributes {bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<8xf32> {bactrian.role = "batch"}, %y: tensor<8x64xf32> {bactrian.role = "batch"})
      -> (tensor<8x64xf32>, tensor<8x64xf32>) {
    // CHECK: %[[S:.*]] = stablehlo.sine %{{.*}} {bactrian.phase = "forward"
    %s = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8xf32>
    // CHECK-DAG: %[[F:.*]] = stablehlo.broadcast_in_dim %[[S]], dims = [0] {bactrian.phase = "forward"
    // CHECK-DAG: %[[B:.*]] = stablehlo.broadcast_in_dim %[[S]], dims = [0] {bactrian.phase = "backward"
    %b = stablehlo.broadcast_in_dim %s, dims = [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<8xf32>) -> tensor<8x64xf32>
    // CHECK: %[[Z:.*]] = stablehlo.multiply %{{.*}}, %[[F]] {bactrian.phase = "forward"
    %z = stablehlo.multiply %y, %b {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8x64xf32>
    // CHECK: stablehlo.multiply %{{.*}}, %[[B]] {bactrian.phase = "backward"
    %g = stablehlo.multiply %y, %b {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<8x64xf32>
    return %z, %g : tensor<8x64xf32>, tensor<8x64xf32>
  }
}

// -----

// What is made from constants, or from state by simple ops, is made again; nothing is kept for it.
// CHECK-LABEL: module @constants_and_state_are_there
module @constants_and_state_are_there attributes {bactrian.num_stages = 1 : i64} {
  // CHECK: func.func public @main(%[[W:[^:]*]]:
  func.func public @main(%w: tensor<64xf32> {bactrian.role = "state"}) -> (tensor<64xf32>, tensor<64xf32>) {
    // CHECK-DAG: %[[CF:.*]] = stablehlo.constant {bactrian.phase = "forward"
    // CHECK-DAG: %[[CB:.*]] = stablehlo.constant {bactrian.phase = "backward"
    %c = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.0> : tensor<64xf32>
    // CHECK-DAG: %[[MF:.*]] = stablehlo.multiply %[[W]], %[[CF]] {bactrian.phase = "forward"
    // CHECK-DAG: %[[MB:.*]] = stablehlo.multiply %[[W]], %[[CB]] {bactrian.phase = "backward"
    %m = stablehlo.multiply %w, %c {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64xf32>
    // CHECK: stablehlo.sine %[[MF]] {bactrian.phase = "forward"
    %y = stablehlo.sine %m {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64xf32>
    // CHECK: stablehlo.cosine %[[MB]] {bactrian.phase = "backward"
    %g = stablehlo.cosine %m {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<64xf32>
    return %y, %g : tensor<64xf32>, tensor<64xf32>
  }
}

// -----

// The gelu of a layer: the product before it and the slow tanh are kept; squares, sums and factors are made again. What
// the weight's gradient reads is kept: made again it would be written again.
// CHECK-LABEL: module @gelu
module @gelu attributes {bactrian.num_stages = 1 : i64} {
  // CHECK: func.func public @main(%[[W:[^:]*]]: {{.*}}, %[[X:[^:]*]]:
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<256x256xf32> {bactrian.role = "batch"})
      -> (tensor<256x256xf32>, tensor<256x256xf32>, tensor<256x256xf32>) {
    // CHECK: %[[H:.*]] = stablehlo.dot_general %[[X]], %[[W]]{{.*}}bactrian.phase = "forward"
    %h = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    // CHECK-DAG: %[[Q:.*]] = stablehlo.multiply %[[H]], %[[H]] {bactrian.phase = "backward"
    %q = stablehlo.multiply %h, %h {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK: %[[T:.*]] = stablehlo.tanh %{{.*}} {bactrian.phase = "forward"
    %t = stablehlo.tanh %q {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK-DAG: %[[TT:.*]] = stablehlo.multiply %[[T]], %[[T]] {bactrian.phase = "backward"
    %tt = stablehlo.multiply %t, %t {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK-DAG: %[[A:.*]] = stablehlo.add %[[H]], %[[T]] {bactrian.phase = "forward"
    %a = stablehlo.add %h, %t {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    %y = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    // CHECK: stablehlo.multiply %[[Q]], %[[TT]] {bactrian.phase = "backward"
    %p = stablehlo.multiply %q, %tt {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK: stablehlo.multiply %{{.*}}, %[[T]] {bactrian.phase = "backward"
    %r = stablehlo.multiply %p, %t {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK: stablehlo.multiply %{{.*}}, %[[H]] {bactrian.phase = "backward"
    %g = stablehlo.multiply %r, %h {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    // CHECK: stablehlo.dot_general %[[A]], %{{.*}}bactrian.phase = "backward"
    %dw = stablehlo.dot_general %a, %g, contracting_dims = [0] x [0] {bactrian.phase = "backward", bactrian.stage = 0 : i64}
      : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    return %y, %g, %dw : tensor<256x256xf32>, tensor<256x256xf32>, tensor<256x256xf32>
  }
}

// -----

// The last stage of 1F1B turns at once: nothing is kept there, so nothing is made again.
// CHECK-LABEL: module @fused_stage
module @fused_stage attributes {bactrian.num_stages = 1 : i64, bactrian.schedule = "1f1b"} {
  func.func public @main(%x: tensor<64xf32> {bactrian.role = "batch"}) -> (tensor<64xf32>, tensor<64xf32>) {
    // CHECK: %[[H:.*]] = stablehlo.sine
    %h = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64xf32>
    // CHECK-NEXT: %[[Q:.*]] = stablehlo.multiply %[[H]], %[[H]] {bactrian.phase = "forward"
    %q = stablehlo.multiply %h, %h {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64xf32>
    // CHECK-NEXT: stablehlo.add %[[H]], %[[Q]] {bactrian.phase = "backward"
    %g = stablehlo.add %h, %q {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<64xf32>
    return %q, %g : tensor<64xf32>, tensor<64xf32>
  }
}

// -----

// A layer keeps what comes into it. It is computed again, product included, from behind a barrier that waits for the
// gradient; what its op gives to the next layer is kept.
// CHECK-LABEL: module @layers_again
module @layers_again attributes {bactrian.num_layers = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.remat = ["all", "none"]} {
  // CHECK: func.func public @main(%[[W:[^:]*]]: {{.*}}, %[[X:[^:]*]]:
  func.func public @main(%w: tensor<64x64xf32> {bactrian.role = "state"}, %x: tensor<64x64xf32> {bactrian.role = "batch"})
      -> (tensor<64x64xf32>, tensor<64x64xf32>) {
    // CHECK: %[[H:.*]] = stablehlo.dot_general %[[X]], %[[W]]{{.*}}bactrian.phase = "forward"
    %h = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>
    // CHECK: %[[Y:.*]] = stablehlo.sine %[[H]] {{.*}}bactrian.phase = "forward"
    %y = stablehlo.sine %h {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64x64xf32>
    // CHECK: %[[Z:.*]] = stablehlo.sine %[[Y]] {{.*}}bactrian.phase = "forward"
    %z = stablehlo.sine %y {bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64x64xf32>
    %c = stablehlo.cosine %h {bactrian.layer = 0 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<64x64xf32>
    // CHECK: %[[G:.*]] = stablehlo.cosine %[[Y]] {{.*}}bactrian.phase = "backward"
    %g = stablehlo.cosine %y {bactrian.layer = 1 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<64x64xf32>
    // CHECK: %[[B:.*]]:3 = stablehlo.optimization_barrier {bactrian.layer = 0 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} %[[X]], %[[W]], %[[G]] :
    // CHECK: %[[HH:.*]] = stablehlo.dot_general %[[B]]#0, %[[B]]#1{{.*}}bactrian.phase = "backward"
    // CHECK: %[[C:.*]] = stablehlo.cosine %[[HH]] {{.*}}bactrian.phase = "backward"
    // CHECK: stablehlo.multiply %[[B]]#2, %[[C]]
    %d = stablehlo.multiply %g, %c {bactrian.layer = 0 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<64x64xf32>
    return %z, %d : tensor<64x64xf32>, tensor<64x64xf32>
  }
}

// -----

// The product with a weight is kept, that of two activations is not.
// CHECK-LABEL: module @products_are_kept
module @products_are_kept attributes {bactrian.num_layers = 1 : i64, bactrian.num_stages = 1 : i64, bactrian.remat = ["products"]} {
  // CHECK: func.func public @main(%[[W:[^:]*]]: {{.*}}, %[[X:[^:]*]]:
  func.func public @main(%w: tensor<64x64xf32> {bactrian.role = "state"}, %x: tensor<2x64x64xf32> {bactrian.role = "batch"})
      -> (tensor<2x64x64xf32>, tensor<2x64x64xf32>) {
    // CHECK: %[[H:.*]] = stablehlo.dot_general %[[X]], %[[W]]{{.*}}bactrian.phase = "forward"
    %h = stablehlo.dot_general %x, %w, contracting_dims = [2] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<2x64x64xf32>, tensor<64x64xf32>) -> tensor<2x64x64xf32>
    %y = stablehlo.dot_general %h, %h, batching_dims = [0] x [0], contracting_dims = [2] x [2] {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<2x64x64xf32>, tensor<2x64x64xf32>) -> tensor<2x64x64xf32>
    // CHECK: %[[B:.*]] = stablehlo.optimization_barrier {{{.*}}} %[[H]] :
    // CHECK-NOT: stablehlo.dot_general{{.*}}contracting_dims = [2] x [0]
    // CHECK: %[[Y:.*]] = stablehlo.dot_general %[[B]], %[[B]]{{.*}}bactrian.phase = "backward"
    // CHECK: stablehlo.cosine %[[Y]]
    %g = stablehlo.cosine %y {bactrian.layer = 0 : i64, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<2x64x64xf32>
    return %y, %g : tensor<2x64x64xf32>, tensor<2x64x64xf32>
  }
}
