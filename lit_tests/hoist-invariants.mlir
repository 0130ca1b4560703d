// RUN: bactrian-opt %s --hoist-invariants --split-input-file | FileCheck %s
// RUN: bactrian-opt %s --hoist-invariants=skip=0 --split-input-file 2>&1 | FileCheck %s --check-prefix=SKIP

// A stage that is skipped stays as it is, and the user is told.
// SKIP: remark: stage 0 computes for each microbatch what none of them changes
// SKIP-LABEL: module @cast_of_a_weight
// SKIP: stablehlo.convert %{{.*}} {bactrian.phase = "forward"
// SKIP-NOT: "prepare"

// Both phases read the cast: it is held once, not for each microbatch.
// CHECK-LABEL: module @cast_of_a_weight
module @cast_of_a_weight attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<64x256xbf16> {bactrian.role = "batch"})
      -> (tensor<64x256xbf16>, tensor<64x256xbf16>) {
    // CHECK: %[[C:.*]] = stablehlo.convert %{{.*}} {bactrian.phase = "prepare"
    %c = stablehlo.convert %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xbf16>
    // CHECK: stablehlo.dot_general %{{.*}}, %[[C]]{{.*}}bactrian.phase = "forward"
    %y = stablehlo.dot_general %x, %c, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
    // CHECK: stablehlo.dot_general %{{.*}}, %[[C]]{{.*}}bactrian.phase = "backward"
    %g = stablehlo.dot_general %y, %c, contracting_dims = [1] x [1] {bactrian.phase = "backward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
    return %y, %g : tensor<64x256xbf16>, tensor<64x256xbf16>
  }
}

// -----

// With one microbatch nothing is done twice.
// CHECK-LABEL: module @one_microbatch
module @one_microbatch attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<64x256xbf16> {bactrian.role = "batch"}) -> tensor<64x256xbf16> {
    // CHECK: stablehlo.convert %{{.*}} {bactrian.phase = "forward"
    %c = stablehlo.convert %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xbf16>
    %y = stablehlo.dot_general %x, %c, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
    return %y : tensor<64x256xbf16>
  }
}

// -----

// What is fused into the sum that reads it would be read from memory in the place of the weight: nothing is won. Nor is
// anything by a transposed weight, which the product takes in.
// CHECK-LABEL: module @free_in_readers
module @free_in_readers attributes {bactrian.num_microbatches = 8 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<256x256xf32> {bactrian.role = "batch"}) -> tensor<256x256xf32> {
    // CHECK-NOT: prepare
    %n = stablehlo.negate %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    %y = stablehlo.add %x, %n {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    %t = stablehlo.transpose %w, dims = [1, 0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xf32>
    %z = stablehlo.dot_general %y, %t, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    return %z : tensor<256x256xf32>
  }
}

// -----

// Of a chain the smallest value is held: the mask of one byte an element, not the bits of four. The constant that it is
// compared with is there in both phases.
// CHECK-LABEL: module @random_mask
module @random_mask attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%key: tensor<2xui64> {bactrian.role = "state"}, %x: tensor<256x256xui32> {bactrian.role = "batch"}) -> tensor<256x256xui32> {
    // CHECK-DAG: %[[K:.*]] = stablehlo.constant {bactrian.phase = "prepare"
    // CHECK-DAG: stablehlo.rng_bit_generator %{{.*}}bactrian.phase = "prepare"
    // CHECK: %[[M:.*]] = stablehlo.compare {{.*}}%[[K]]{{.*}}bactrian.phase = "prepare"
    %k = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<7> : tensor<256x256xui32>
    %s, %bits = stablehlo.rng_bit_generator %key, algorithm = DEFAULT {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<2xui64>) -> (tensor<2xui64>, tensor<256x256xui32>)
    %m = stablehlo.compare LT, %bits, %k {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xui32>, tensor<256x256xui32>) -> tensor<256x256xi1>
    // CHECK: stablehlo.select %[[M]]{{.*}}bactrian.phase = "forward"
    %y = stablehlo.select %m, %x, %k {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xi1>, tensor<256x256xui32>
    return %y : tensor<256x256xui32>
  }
}

// -----

// Bits of a key that the microbatch's number is folded into are new for each.
// CHECK-LABEL: module @microbatch_index
module @microbatch_index attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}) -> tensor<256x256xf32> {
    // CHECK-NOT: prepare
    %i = stablehlo.custom_call @bactrian.microbatch_index() {bactrian.phase = "forward", bactrian.stage = 0 : i64} : () -> tensor<i32>
    %f = stablehlo.convert %i {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<f32>
    %b = stablehlo.broadcast_in_dim %f, dims = [] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<f32>) -> tensor<256x256xf32>
    %m = stablehlo.multiply %w, %b {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<256x256xf32>
    %y = stablehlo.dot_general %m, %m, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    return %y : tensor<256x256xf32>
  }
}

// -----

// What jax.checkpoint casts again reads the weight around the barrier; what waits there for the gradient stays.
// CHECK-LABEL: module @checkpoint
module @checkpoint attributes {bactrian.num_microbatches = 4 : i64, bactrian.num_stages = 1 : i64} {
  // CHECK: func.func public @main(%[[W:[^:]*]]:
  func.func public @main(%w: tensor<256x256xf32> {bactrian.role = "state"}, %x: tensor<64x256xbf16> {bactrian.role = "batch"}) -> tensor<64x256xbf16> {
    // CHECK: stablehlo.optimization_barrier
    %b:2 = stablehlo.optimization_barrier {bactrian.phase = "backward", bactrian.stage = 0 : i64} %w, %x : tensor<256x256xf32>, tensor<64x256xbf16>
    // CHECK: stablehlo.convert %[[W]] {bactrian.phase = "prepare"
    %c = stablehlo.convert %b#0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : (tensor<256x256xf32>) -> tensor<256x256xbf16>
    %y = stablehlo.dot_general %b#1, %c, contracting_dims = [1] x [0] {bactrian.phase = "backward", bactrian.stage = 0 : i64} : (tensor<64x256xbf16>, tensor<256x256xbf16>) -> tensor<64x256xbf16>
    return %y : tensor<64x256xbf16>
  }
}
