// RUN: bactrian-opt %s --clone-cheap-ops --split-input-file | FileCheck %s

// CHECK-LABEL: module @constant_goes_to_each_stage
module @constant_goes_to_each_stage {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // CHECK-DAG: %[[C0:.*]] = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[C1:.*]] = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 1 : i64}
    %c = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.0> : tensor<4xf32>
    // CHECK: %[[Y:.*]] = stablehlo.multiply %{{.*}}, %[[C0]]
    %y = stablehlo.multiply %x, %c {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: stablehlo.add %[[Y]], %[[C1]]
    %z = stablehlo.add %y, %c {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    return %z : tensor<4xf32>
  }
}

// -----

// A causal mask: every op of it exists once per stage, in order.
// CHECK-LABEL: module @mask_goes_to_each_stage
module @mask_goes_to_each_stage {
  func.func public @main(%x: tensor<64x64xf32> {bactrian.role = "batch"}) -> tensor<64x64xf32> {
    // CHECK-DAG: %[[R0:.*]] = stablehlo.iota dim = 0 {bactrian.phase = "forward", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[R1:.*]] = stablehlo.iota dim = 0 {bactrian.phase = "forward", bactrian.stage = 1 : i64}
    %r = stablehlo.iota dim = 0 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64x64xi32>
    // CHECK-DAG: %[[C0:.*]] = stablehlo.iota dim = 1 {bactrian.phase = "forward", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[C1:.*]] = stablehlo.iota dim = 1 {bactrian.phase = "forward", bactrian.stage = 1 : i64}
    %c = stablehlo.iota dim = 1 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<64x64xi32>
    // CHECK-DAG: %[[M0:.*]] = stablehlo.compare GE, %[[R0]], %[[C0]] {{.*}}bactrian.stage = 0 : i64
    // CHECK-DAG: %[[M1:.*]] = stablehlo.compare GE, %[[R1]], %[[C1]] {{.*}}bactrian.stage = 1 : i64
    %m = stablehlo.compare GE, %r, %c {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<64x64xi32>, tensor<64x64xi32>) -> tensor<64x64xi1>
    // CHECK: %[[Y:.*]] = stablehlo.select %[[M0]], %[[X:.*]], %[[X]]
    %y = stablehlo.select %m, %x, %x {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : tensor<64x64xi1>, tensor<64x64xf32>
    // CHECK: stablehlo.select %[[M1]], %[[Y]], %[[X]]
    %z = stablehlo.select %m, %y, %x {bactrian.phase = "forward", bactrian.stage = 1 : i64}
      : tensor<64x64xi1>, tensor<64x64xf32>
    return %z : tensor<64x64xf32>
  }
}

// -----

// Bits drawn from a key are drawn again on the other stage, but not for another phase.
// CHECK-LABEL: module @random_bits_across_stages_not_across_phases
module @random_bits_across_stages_not_across_phases {
  // CHECK: func.func public @main(%[[KEY:[^:]*]]:
  func.func public @main(%key: tensor<2xui64> {bactrian.role = "state"}, %x: tensor<512xui32> {bactrian.role = "batch"})
      -> (tensor<512xui32>, tensor<512xui32>) {
    // CHECK-DAG: %{{.*}}, %[[BITS0:.*]] = stablehlo.rng_bit_generator %[[KEY]], {{.*}}bactrian.stage = 0 : i64
    // CHECK-DAG: %{{.*}}, %[[BITS1:.*]] = stablehlo.rng_bit_generator %[[KEY]], {{.*}}bactrian.stage = 1 : i64
    %next, %bits = stablehlo.rng_bit_generator %key, algorithm = THREE_FRY
      {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<2xui64>) -> (tensor<2xui64>, tensor<512xui32>)
    // CHECK-NOT: stablehlo.rng_bit_generator
    // CHECK: %[[Y:.*]] = stablehlo.xor %{{.*}}, %[[BITS0]]
    %y = stablehlo.xor %x, %bits {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<512xui32>
    // CHECK: %[[Z:.*]] = stablehlo.xor %[[Y]], %[[BITS1]]
    %z = stablehlo.xor %y, %bits {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<512xui32>
    // CHECK: stablehlo.xor %[[Z]], %[[BITS0]] {bactrian.phase = "backward", bactrian.stage = 0 : i64}
    %g = stablehlo.xor %z, %bits {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<512xui32>
    return %z, %g : tensor<512xui32>, tensor<512xui32>
  }
}

// -----

// CHECK-LABEL: module @dot_of_constants_is_sent
module @dot_of_constants_is_sent {
  func.func public @main(%x: tensor<4x4xf32> {bactrian.role = "batch"}) -> tensor<4x4xf32> {
    %c = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.0> : tensor<4x4xf32>
    // CHECK: %[[D:.*]] = stablehlo.dot_general
    %d = stablehlo.dot_general %c, %c, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    // CHECK-NOT: stablehlo.dot_general
    // CHECK: stablehlo.multiply %{{.*}}, %[[D]]
    %y = stablehlo.multiply %x, %d {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4x4xf32>
    // CHECK: stablehlo.add %{{.*}}, %[[D]]
    %z = stablehlo.add %y, %d {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4x4xf32>
    return %z : tensor<4x4xf32>
  }
}

// -----

// The learning rate of a step is computed on every stage; a large value of the update is sent.
// CHECK-LABEL: module @update_scalars_are_cloned_large_values_not
module @update_scalars_are_cloned_large_values_not {
  // CHECK: func.func public @main(%[[N:[^:]*]]: tensor<f32> {{{.*}}}, %[[V:[^:]*]]: tensor<128xf32>
  func.func public @main(%n: tensor<f32> {bactrian.role = "state"}, %v: tensor<128xf32> {bactrian.role = "state"})
      -> (tensor<f32>, tensor<f32>, tensor<128xf32>, tensor<128xf32>) {
    // CHECK-DAG: %[[R0:.*]] = stablehlo.rsqrt %[[N]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[R1:.*]] = stablehlo.rsqrt %[[N]] {bactrian.phase = "update", bactrian.stage = 1 : i64}
    %rate = stablehlo.rsqrt %n {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK: stablehlo.sine %[[R0]]
    %a = stablehlo.sine %rate {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK: stablehlo.cosine %[[R1]]
    %b = stablehlo.cosine %rate {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<f32>
    // CHECK: %[[W:.*]] = stablehlo.rsqrt %[[V]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    %w = stablehlo.rsqrt %v {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<128xf32>
    // CHECK-NEXT: stablehlo.sine %[[W]]
    %c = stablehlo.sine %w {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<128xf32>
    // CHECK-NEXT: stablehlo.cosine %[[W]]
    %d = stablehlo.cosine %w {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<128xf32>
    return %a, %b, %c, %d : tensor<f32>, tensor<f32>, tensor<128xf32>, tensor<128xf32>
  }
}

// -----

// A mask of positions is larger than the positions, which the other stage loads for itself.
// CHECK-LABEL: module @mask_of_the_batch_goes_to_each_stage
module @mask_of_the_batch_goes_to_each_stage {
  // CHECK: func.func public @main(%[[P:[^:]*]]:
  func.func public @main(%p: tensor<8xi32> {bactrian.role = "batch"}, %x: tensor<8x8xf32> {bactrian.role = "batch"}, %w: tensor<8x8xf32> {bactrian.role = "state"}) -> tensor<8x8xf32> {
    // CHECK-DAG: %[[R0:.*]] = stablehlo.broadcast_in_dim %[[P]], dims = [0] {{.*}}bactrian.stage = 0 : i64
    // CHECK-DAG: %[[R1:.*]] = stablehlo.broadcast_in_dim %[[P]], dims = [0] {{.*}}bactrian.stage = 1 : i64
    %r = stablehlo.broadcast_in_dim %p, dims = [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8xi32>) -> tensor<8x8xi32>
    %c = stablehlo.broadcast_in_dim %p, dims = [1] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8xi32>) -> tensor<8x8xi32>
    // CHECK-DAG: %[[M0:.*]] = stablehlo.compare GE, %[[R0]], {{.*}}bactrian.stage = 0 : i64
    // CHECK-DAG: %[[M1:.*]] = stablehlo.compare GE, %[[R1]], {{.*}}bactrian.stage = 1 : i64
    %m = stablehlo.compare GE, %r, %c {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x8xi32>, tensor<8x8xi32>) -> tensor<8x8xi1>
    // CHECK: %[[H:.*]] = stablehlo.dot_general
    %h = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x8xf32>, tensor<8x8xf32>) -> tensor<8x8xf32>
    // CHECK: %[[Y:.*]] = stablehlo.select %[[M0]], %[[H]]
    %y = stablehlo.select %m, %h, %h {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8x8xi1>, tensor<8x8xf32>
    // CHECK: stablehlo.select %[[M1]], %[[Y]]
    %z = stablehlo.select %m, %y, %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<8x8xi1>, tensor<8x8xf32>
    return %z : tensor<8x8xf32>
  }
}

// -----

// Without a product, elementwise ops on the batch are all the work: they stay on their stage.
// CHECK-LABEL: module @batch_value_is_sent
module @batch_value_is_sent {
  func.func public @main(%x: tensor<f32> {bactrian.role = "batch"}) -> (tensor<f32>, tensor<f32>) {
    // CHECK: %[[S:.*]] = stablehlo.sine
    %s = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK-NEXT: stablehlo.cosine %[[S]]
    %y = stablehlo.cosine %s {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK-NEXT: stablehlo.tanh %[[S]]
    %z = stablehlo.tanh %s {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<f32>
    return %y, %z : tensor<f32>, tensor<f32>
  }
}

// -----

// What is made of more bytes of the batch than it has, or by more than elementwise ops, is sent.
// CHECK-LABEL: module @small_values_of_the_batch_are_sent
module @small_values_of_the_batch_are_sent {
  func.func public @main(%x: tensor<8x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> (tensor<8xf32>, tensor<8x64xf32>) {
    %zero = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<0.0> : tensor<f32>
    // CHECK: %[[S:.*]] = stablehlo.slice
    // CHECK-NOT: stablehlo.slice
    %s = stablehlo.slice %x [0:8, 0:1] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x64xf32>) -> tensor<8x1xf32>
    // CHECK: %[[N:.*]] = stablehlo.reduce
    // CHECK-NOT: stablehlo.reduce
    %n = stablehlo.reduce(%x init: %zero) applies stablehlo.add across dimensions = [1] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x64xf32>, tensor<f32>) -> tensor<8xf32>
    // CHECK: stablehlo.reshape %[[S]] {{.*}}bactrian.stage = 1 : i64
    %t = stablehlo.reshape %s {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<8x1xf32>) -> tensor<8xf32>
    // CHECK: stablehlo.add {{.*}}%[[N]] {{.*}}bactrian.stage = 1 : i64
    %y = stablehlo.add %t, %n {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<8xf32>
    %z = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x64xf32>, tensor<64x64xf32>) -> tensor<8x64xf32>
    return %y, %z : tensor<8xf32>, tensor<8x64xf32>
  }
}

// -----

// An op with several results is cloned whole; a branch that captures a cloned value reads its own stage's clone.
// CHECK-LABEL: module @captured_constant_goes_to_each_stage
module @captured_constant_goes_to_each_stage {
  func.func public @main(%i: tensor<i32> {bactrian.role = "batch"}) -> (tensor<f32>, tensor<f32>) {
    // CHECK-DAG: %[[C0:.*]] = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[C1:.*]] = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 1 : i64}
    %c = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.0> : tensor<f32>
    // CHECK-DAG: %[[D0:.*]]:2 = stablehlo.optimization_barrier {{.*}}%[[C0]], %[[C0]]
    // CHECK-DAG: %[[D1:.*]]:2 = stablehlo.optimization_barrier {{.*}}%[[C1]], %[[C1]]
    %d:2 = stablehlo.optimization_barrier {bactrian.phase = "forward", bactrian.stage = 0 : i64} %c, %c
      : tensor<f32>, tensor<f32>
    // CHECK: stablehlo.sine %[[D0]]#0
    %y = stablehlo.sine %d#0 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK: "stablehlo.case"
    // CHECK-NEXT: stablehlo.return %[[D1]]#1
    %z = "stablehlo.case"(%i) ({
      stablehlo.return %d#1 : tensor<f32>
    }) {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<i32>) -> tensor<f32>
    return %y, %z : tensor<f32>, tensor<f32>
  }
}

// -----

// The step count is an integer of the state that both stages read: each stage counts for itself. The float scale, and the
// count that depends on it, are brought up to date in one place.
// CHECK-LABEL: module @each_stage_counts
module @each_stage_counts attributes {bactrian.num_stages = 2 : i64} {
  // CHECK: func.func public @main(%[[COUNT:[^:]*]]: tensor<i32>
  // CHECK-DAG: stablehlo.add %[[COUNT]], %{{.*}} {bactrian.phase = "update", bactrian.stage = 0 : i64}
  // CHECK-DAG: stablehlo.add %[[COUNT]], %{{.*}} {bactrian.counter = [0], bactrian.phase = "update", bactrian.stage = 1 : i64}
  // CHECK-NOT: bactrian.counter
  func.func public @main(%count: tensor<i32> {bactrian.role = "state"}, %scale: tensor<f32> {bactrian.role = "state"}, %good: tensor<i32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<i32> {bactrian.updates = 0 : i64}, tensor<f32> {bactrian.updates = 1 : i64}, tensor<i32> {bactrian.updates = 2 : i64}, tensor<f32>, tensor<f32>) {
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %one = stablehlo.constant {bactrian.phase = "update", bactrian.stage = 0 : i64} dense<1> : tensor<i32>
    %next = stablehlo.add %count, %one {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<i32>
    %next_scale = stablehlo.add %scale, %scale {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    %finite = stablehlo.is_finite %scale {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<f32>) -> tensor<i1>
    %more = stablehlo.convert %finite {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i1>) -> tensor<i32>
    %next_good = stablehlo.add %good, %more {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<i32>
    %f0 = stablehlo.convert %count {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<f32>
    %f1 = stablehlo.convert %count {bactrian.phase = "update", bactrian.stage = 1 : i64} : (tensor<i32>) -> tensor<f32>
    %g1 = stablehlo.convert %good {bactrian.phase = "update", bactrian.stage = 1 : i64} : (tensor<i32>) -> tensor<f32>
    %h1 = stablehlo.multiply %f1, %g1 {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<f32>
    %i1 = stablehlo.multiply %h1, %scale {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<f32>
    return %next, %next_scale, %next_good, %f0, %i1 : tensor<i32>, tensor<f32>, tensor<i32>, tensor<f32>, tensor<f32>
  }
}

// -----

// A scalar counter is on every stage, also on those that do not read it; one of several elements only where it is read.
// The scalar that depends on such a one is where both are.
// CHECK-LABEL: module @every_stage_has_the_number_of_the_step
module @every_stage_has_the_number_of_the_step attributes {bactrian.num_stages = 2 : i64} {
  // CHECK: func.func public @main(%[[STEP:[^:]*]]: tensor<i32> {{{.*}}}, %[[KEY:[^:]*]]: tensor<2xui32> {{{.*}}}, %[[LAST:[^:]*]]: tensor<ui32>
  func.func public @main(%step: tensor<i32> {bactrian.role = "state"}, %key: tensor<2xui32> {bactrian.role = "state"}, %last: tensor<ui32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<i32> {bactrian.updates = 0 : i64}, tensor<2xui32> {bactrian.updates = 1 : i64}, tensor<ui32> {bactrian.updates = 2 : i64}, tensor<4xf32>) {
    // CHECK: stablehlo.custom_call @bactrian.gradient_boundary
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-DAG: stablehlo.add %[[STEP]], %[[STEP]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-DAG: stablehlo.add %[[STEP]], %[[STEP]] {bactrian.counter = [0], bactrian.phase = "update", bactrian.stage = 1 : i64}
    %next = stablehlo.add %step, %step {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<i32>
    // CHECK-NOT: bactrian.counter
    %next_key = stablehlo.add %key, %key {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<2xui32>
    %row = stablehlo.slice %key [0:1] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<2xui32>) -> tensor<1xui32>
    %word = stablehlo.reshape %row {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<1xui32>) -> tensor<ui32>
    %next_last = stablehlo.add %last, %word {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<ui32>
    %y = stablehlo.negate %b {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<4xf32>
    return %next, %next_key, %next_last, %y : tensor<i32>, tensor<2xui32>, tensor<ui32>, tensor<4xf32>
  }
}
