// RUN: bactrian-opt %s --accumulate-gradients --split-input-file | FileCheck %s

// CHECK-LABEL: module @one_microbatch_needs_no_accumulator
module @one_microbatch_needs_no_accumulator attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // CHECK: %[[G:.*]] = stablehlo.negate
    %g = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[G]]) {{.*}}reductions = "accumulated"
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "mean"}}
      : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: return %[[B]]
    return %b : tensor<4xf32>
  }
}

// -----

// CHECK-LABEL: module @mean_is_divided_once
module @mean_is_divided_once attributes {bactrian.num_microbatches = 2 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // CHECK: %[[G:.*]] = stablehlo.negate
    %g = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    // CHECK-NEXT: %[[Z:.*]] = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 1 : i64} dense<0.0
    // CHECK-NEXT: %[[A:.*]] = stablehlo.add %[[Z]], %[[G]] {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 1 : i64}
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[A]]) {{.*}}reductions = "accumulated"
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "mean"}}
      : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: %[[TWO:.*]] = stablehlo.constant {bactrian.phase = "update", bactrian.stage = 1 : i64} dense<2.0
    // CHECK-NEXT: %[[M:.*]] = stablehlo.divide %[[B]], %[[TWO]] {bactrian.phase = "update", bactrian.stage = 1 : i64}
    // CHECK-NEXT: return %[[M]]
    return %b : tensor<4xf32>
  }
}

// -----

// An integer count is summed as integers; the last value needs no accumulator.
// CHECK-LABEL: module @integer_sum_and_last
module @integer_sum_and_last attributes {bactrian.num_microbatches = 3 : i64} {
  func.func public @main(%n: tensor<i32> {bactrian.role = "batch"}) -> (tensor<i32>, tensor<i32>) {
    // CHECK: %[[G:.*]] = stablehlo.negate
    %g = stablehlo.negate %n {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<i32>
    // CHECK-NEXT: %[[Z:.*]] = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 0 : i64} dense<0>
    // CHECK-NEXT: %[[A:.*]] = stablehlo.add %[[Z]], %[[G]] {bactrian.accumulate, bactrian.phase = "forward"
    // CHECK-NEXT: %[[B:.*]]:2 = stablehlo.custom_call @bactrian.gradient_boundary(%[[A]], %[[G]])
    // CHECK-SAME: reductions = "accumulated,accumulated"
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%g, %g) {mhlo.backend_config =
      {kinds = "aux,aux", reductions = "sum,last"}}
      : (tensor<i32>, tensor<i32>) -> (tensor<i32>, tensor<i32>)
    // CHECK-NEXT: return %[[B]]#0, %[[B]]#1
    return %b#0, %b#1 : tensor<i32>, tensor<i32>
  }
}

// -----

// CHECK-LABEL: module @concat_fills_a_buffer
module @concat_fills_a_buffer attributes {bactrian.num_microbatches = 3 : i64} {
  func.func public @main(%x: tensor<2x5xf32> {bactrian.role = "batch"}) -> tensor<6x5xf32> {
    // CHECK: %[[Y:.*]] = stablehlo.negate
    %y = stablehlo.negate %x {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<2x5xf32>
    // CHECK-NEXT: %[[Z:.*]] = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 1 : i64} dense<0.0{{.*}}> : tensor<6x5xf32>
    // CHECK-NEXT: %[[I:.*]] = stablehlo.custom_call @bactrian.microbatch_index() {bactrian.phase = "forward"
    // CHECK-NEXT: %[[R:.*]] = stablehlo.constant {{.*}} dense<2>
    // CHECK-NEXT: %[[S:.*]] = stablehlo.multiply %[[I]], %[[R]]
    // CHECK-NEXT: %[[O:.*]] = stablehlo.constant {{.*}} dense<0>
    // CHECK-NEXT: %[[A:.*]] = stablehlo.dynamic_update_slice %[[Z]], %[[Y]], %[[S]], %[[O]] {bactrian.accumulate
    // CHECK-NEXT: stablehlo.custom_call @bactrian.gradient_boundary(%[[A]])
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "output", reductions = "concat"}}
      : (tensor<2x5xf32>) -> tensor<6x5xf32>
    return %b : tensor<6x5xf32>
  }
}

// -----

// Each stage accumulates its own part; the parts are added once per step.
// CHECK-LABEL: module @tied_parameter_is_accumulated_in_parts
module @tied_parameter_is_accumulated_in_parts attributes {bactrian.num_microbatches = 2 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // CHECK: %[[G0:.*]] = stablehlo.negate
    %g0 = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK-NEXT: %[[G1:.*]] = stablehlo.sine
    %g1 = stablehlo.sine %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %g = stablehlo.add %g1, %g0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: %[[A0:.*]] = stablehlo.add %{{.*}}, %[[G0]] {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0
    // CHECK: %[[A1:.*]] = stablehlo.add %{{.*}}, %[[G1]] {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 1
    // CHECK-NEXT: %[[B:.*]]:2 = stablehlo.custom_call @bactrian.gradient_boundary(%[[A0]], %[[A1]])
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "sum"}}
      : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: %[[T:.*]] = stablehlo.add %[[B]]#0, %[[B]]#1 {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-NEXT: return %[[T]]
    return %b : tensor<4xf32>
  }
}

// -----

// Two parts of one stage are added first, and the transpose behind the sum is done once.
// CHECK-LABEL: module @tied_parameter_on_three_stages_with_a_transpose
module @tied_parameter_on_three_stages_with_a_transpose attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%x: tensor<4x2xf32> {bactrian.role = "batch"}) -> tensor<2x4xf32> {
    // CHECK: %[[G0:.*]] = stablehlo.negate
    %g0 = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4x2xf32>
    // CHECK-NEXT: %[[G1:.*]] = stablehlo.sine
    %g1 = stablehlo.sine %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4x2xf32>
    // CHECK-NEXT: %[[G2:.*]] = stablehlo.cosine
    %g2 = stablehlo.cosine %x {bactrian.phase = "backward", bactrian.stage = 2 : i64} : tensor<4x2xf32>
    // CHECK-NEXT: %[[H2:.*]] = stablehlo.tanh
    %h2 = stablehlo.tanh %x {bactrian.phase = "backward", bactrian.stage = 2 : i64} : tensor<4x2xf32>
    %s1 = stablehlo.add %g2, %g1 {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4x2xf32>
    %s2 = stablehlo.add %s1, %g0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4x2xf32>
    %s3 = stablehlo.add %s2, %h2 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4x2xf32>
    %t = stablehlo.transpose %s3, dims = [1, 0] {bactrian.phase = "backward", bactrian.stage = 0 : i64} : (tensor<4x2xf32>) -> tensor<2x4xf32>
    // CHECK-NEXT: %[[P2:.*]] = stablehlo.add %[[G2]], %[[H2]] {bactrian.phase = "backward", bactrian.stage = 2 : i64}
    // CHECK-NEXT: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary(%[[G0]], %[[G1]], %[[P2]])
    %t_ = stablehlo.custom_call @bactrian.gradient_boundary(%t) {mhlo.backend_config =
      {kinds = "gradient", reductions = "sum"}}
      : (tensor<2x4xf32>) -> tensor<2x4xf32>
    // CHECK-NEXT: %[[S:.*]] = stablehlo.add %[[B]]#0, %[[B]]#1 {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-NEXT: %[[T:.*]] = stablehlo.add %[[S]], %[[B]]#2
    // CHECK-NEXT: %[[R:.*]] = stablehlo.transpose %[[T]], dims = [1, 0] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-NEXT: return %[[R]]
    return %t_ : tensor<2x4xf32>
  }
}

// -----

// The sum has another reader, so it is not split.
// CHECK-LABEL: module @sum_that_is_read_elsewhere_stays
module @sum_that_is_read_elsewhere_stays attributes {bactrian.num_microbatches = 2 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32>, tensor<4xf32>) {
    %g0 = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %g1 = stablehlo.sine %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    // CHECK: %[[G:.*]] = stablehlo.add
    %g = stablehlo.add %g1, %g0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK-NEXT: %[[H:.*]] = stablehlo.cosine %[[G]]
    %h = stablehlo.cosine %g {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: %[[A:.*]] = stablehlo.add %{{.*}}, %[[G]] {bactrian.accumulate
    // CHECK-NEXT: stablehlo.custom_call @bactrian.gradient_boundary(%[[A]], %[[H]])
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%g, %h) {mhlo.backend_config =
      {kinds = "gradient,gradient", reductions = "sum,last"}}
      : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
    return %b#0, %b#1 : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// Stage 1 folds its two parts (one of them a bias's), each stage sends one scalar, and combines for itself. The clip
// of a small gradient is no fold: it stays where the gradient is.
// CHECK-LABEL: module @global_norm_is_one_partial_per_stage
module @global_norm_is_one_partial_per_stage attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}, %y: tensor<128xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32>, tensor<4xf32>, tensor<128xf32>) {
    %g0 = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %g1 = stablehlo.sine %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %h1 = stablehlo.sine %y {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<128xf32>
    // CHECK: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary
    %b:3 = stablehlo.custom_call @bactrian.gradient_boundary(%g0, %g1, %h1) {mhlo.backend_config =
      {kinds = "gradient,gradient,gradient", reductions = "sum,sum,sum"}}
      : (tensor<4xf32>, tensor<4xf32>, tensor<128xf32>) -> (tensor<4xf32>, tensor<4xf32>, tensor<128xf32>)
    %z = stablehlo.constant {bactrian.phase = "update", bactrian.stage = 0 : i64} dense<0.0> : tensor<f32>
    %s0 = stablehlo.multiply %b#0, %b#0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: %[[N0:.*]] = stablehlo.reduce({{.*}}{bactrian.partial, bactrian.phase = "update", bactrian.stage = 0 : i64}
    %n0 = stablehlo.reduce(%s0 init: %z) applies stablehlo.add across dimensions = [0] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<4xf32>, tensor<f32>) -> tensor<f32>
    %s1 = stablehlo.multiply %b#1, %b#1 {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: %[[N1:.*]] = stablehlo.reduce({{.*}}{bactrian.phase = "update", bactrian.stage = 1 : i64}
    %n1 = stablehlo.reduce(%s1 init: %z) applies stablehlo.add across dimensions = [0] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<4xf32>, tensor<f32>) -> tensor<f32>
    %s2 = stablehlo.multiply %b#2, %b#2 {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<128xf32>
    // CHECK: %[[N2:.*]] = stablehlo.reduce({{.*}}{bactrian.phase = "update", bactrian.stage = 1 : i64}
    %n2 = stablehlo.reduce(%s2 init: %z) applies stablehlo.add across dimensions = [0] {bactrian.phase = "update", bactrian.stage = 1 : i64} : (tensor<128xf32>, tensor<f32>) -> tensor<f32>
    // CHECK-NEXT: %[[P1:.*]] = stablehlo.add %[[N1]], %[[N2]] {bactrian.partial, bactrian.phase = "update", bactrian.stage = 1 : i64}
    // CHECK-DAG: %[[T0:.*]] = stablehlo.add %[[N0]], %[[P1]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[T1:.*]] = stablehlo.add %[[N0]], %[[P1]] {bactrian.phase = "update", bactrian.stage = 1 : i64}
    %t = stablehlo.add %n1, %n0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    %u = stablehlo.add %t, %n2 {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK-DAG: %[[R0:.*]] = stablehlo.rsqrt %[[T0]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    // CHECK-DAG: %[[R1:.*]] = stablehlo.rsqrt %[[T1]] {bactrian.phase = "update", bactrian.stage = 1 : i64}
    %r = stablehlo.rsqrt %u {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<f32>
    // CHECK-DAG: %[[F0:.*]] = stablehlo.broadcast_in_dim %[[R0]], {{.*}}bactrian.stage = 0 : i64} : (tensor<f32>) -> tensor<4xf32>
    // CHECK-DAG: %[[F1:.*]] = stablehlo.broadcast_in_dim %[[R1]], {{.*}}bactrian.stage = 1 : i64} : (tensor<f32>) -> tensor<4xf32>
    %f = stablehlo.broadcast_in_dim %r, dims = [] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<f32>) -> tensor<4xf32>
    // CHECK: stablehlo.multiply %[[B]]#0, %[[F0]] {bactrian.phase = "update", bactrian.stage = 0 : i64}
    %c0 = stablehlo.multiply %b#0, %f {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    // CHECK: stablehlo.multiply %[[B]]#1, %[[F1]] {bactrian.phase = "update", bactrian.stage = 1 : i64}
    %c1 = stablehlo.multiply %b#1, %f {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<4xf32>
    %h = stablehlo.broadcast_in_dim %r, dims = [] {bactrian.phase = "update", bactrian.stage = 1 : i64} : (tensor<f32>) -> tensor<128xf32>
    %c2 = stablehlo.multiply %b#2, %h {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<128xf32>
    return %c0, %c1, %c2 : tensor<4xf32>, tensor<4xf32>, tensor<128xf32>
  }
}

// -----

// jnp.all(jnp.array([...])) is a fold, too.
// CHECK-LABEL: module @all_of_an_array_is_folded_per_stage
module @all_of_an_array_is_folded_per_stage attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%x: tensor<i1> {bactrian.role = "batch"}) -> tensor<i1> {
    %g0 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<i1>
    %g1 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<i1>
    %h1 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<i1>
    // CHECK: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary
    %b:3 = stablehlo.custom_call @bactrian.gradient_boundary(%g0, %g1, %h1) {mhlo.backend_config =
      {kinds = "aux,aux,aux", reductions = "last,last,last"}}
      : (tensor<i1>, tensor<i1>, tensor<i1>) -> (tensor<i1>, tensor<i1>, tensor<i1>)
    %init = stablehlo.constant {bactrian.phase = "update", bactrian.stage = 0 : i64} dense<true> : tensor<i1>
    %r0 = stablehlo.reshape %b#0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i1>) -> tensor<1xi1>
    %r1 = stablehlo.reshape %b#1 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i1>) -> tensor<1xi1>
    %r2 = stablehlo.reshape %b#2 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i1>) -> tensor<1xi1>
    // CHECK-NOT: stablehlo.concatenate
    %c = stablehlo.concatenate %r0, %r1, %r2, dim = 0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<1xi1>, tensor<1xi1>, tensor<1xi1>) -> tensor<3xi1>
    // CHECK: %[[S0:.*]] = stablehlo.reshape {{.*}}bactrian.stage = 0 : i64} : (tensor<1xi1>) -> tensor<i1>
    // CHECK: %[[S1:.*]] = stablehlo.reshape {{.*}}bactrian.stage = 1 : i64} : (tensor<1xi1>) -> tensor<i1>
    // CHECK: %[[S2:.*]] = stablehlo.reshape {{.*}}bactrian.stage = 1 : i64} : (tensor<1xi1>) -> tensor<i1>
    // CHECK-NEXT: %[[P1:.*]] = stablehlo.and %[[S1]], %[[S2]] {bactrian.partial, bactrian.phase = "update", bactrian.stage = 1 : i64}
    // CHECK-NEXT: %[[T:.*]] = stablehlo.and %[[S0]], %[[P1]]
    // CHECK-NEXT: return %[[T]]
    %all = stablehlo.reduce(%c init: %init) applies stablehlo.and across dimensions = [0] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<3xi1>, tensor<i1>) -> tensor<i1>
    return %all : tensor<i1>
  }
}

// -----

// max(..., initial=7): the initial value is no neutral one, so that it is folded in.
// CHECK-LABEL: module @initial_value_of_a_fold_is_kept
module @initial_value_of_a_fold_is_kept attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%x: tensor<i32> {bactrian.role = "batch"}) -> tensor<i32> {
    %g0 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<i32>
    %g1 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<i32>
    %h1 = stablehlo.not %x {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<i32>
    // CHECK: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary
    %b:3 = stablehlo.custom_call @bactrian.gradient_boundary(%g0, %g1, %h1) {mhlo.backend_config =
      {kinds = "aux,aux,aux", reductions = "last,last,last"}}
      : (tensor<i32>, tensor<i32>, tensor<i32>) -> (tensor<i32>, tensor<i32>, tensor<i32>)
    %init = stablehlo.constant {bactrian.phase = "update", bactrian.stage = 0 : i64} dense<7> : tensor<i32>
    %r0 = stablehlo.reshape %b#0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<1xi32>
    %r1 = stablehlo.reshape %b#1 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<1xi32>
    %r2 = stablehlo.reshape %b#2 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<i32>) -> tensor<1xi32>
    // CHECK-NOT: stablehlo.concatenate
    %c = stablehlo.concatenate %r0, %r1, %r2, dim = 0 {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<3xi32>
    // CHECK-DAG: %[[INIT:.*]] = stablehlo.constant {{.*}} dense<7>
    // CHECK-DAG: %[[S0:.*]] = stablehlo.reshape {{.*}}bactrian.stage = 0 : i64} : (tensor<1xi32>) -> tensor<i32>
    // CHECK: %[[P0:.*]] = stablehlo.maximum %[[S0]], %[[INIT]] {bactrian.partial
    // CHECK: %[[P1:.*]] = stablehlo.maximum {{.*}} {bactrian.partial, bactrian.phase = "update", bactrian.stage = 1 : i64}
    // CHECK-NEXT: stablehlo.maximum %[[P0]], %[[P1]]
    %all = stablehlo.reduce(%c init: %init) applies stablehlo.maximum across dimensions = [0] {bactrian.phase = "update", bactrian.stage = 0 : i64} : (tensor<3xi32>, tensor<i32>) -> tensor<i32>
    return %all : tensor<i32>
  }
}
