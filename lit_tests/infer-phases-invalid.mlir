// RUN: bactrian-opt %s --infer-phases --split-input-file --verify-diagnostics

module @op_bypasses_the_boundary {
  func.func public @main(%w: tensor<f32> {bactrian.role = "state"}, %x: tensor<f32> {bactrian.role = "batch"})
      -> (tensor<f32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.sine %x : tensor<f32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    %s = stablehlo.add %w, %b : tensor<f32>
    // expected-error@+1 {{stablehlo.add below the gradient boundary depends on batch argument %arg1 without passing the boundary}}
    %n = stablehlo.add %s, %y : tensor<f32>
    return %n : tensor<f32>
  }
}

// -----

module @return_bypasses_the_boundary {
  func.func public @main(%x: tensor<f32> {bactrian.role = "batch"}) -> (tensor<f32>, tensor<f32>) {
    // expected-error@+1 {{result 1 of the step depends on batch argument %arg0 without passing the boundary}}
    %y = stablehlo.sine %x : tensor<f32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    return %b, %y : tensor<f32>, tensor<f32>
  }
}

// -----

module @microbatch_index_below_the_boundary {
  func.func public @main(%x: tensor<i32> {bactrian.role = "batch"}) -> (tensor<i32>, tensor<i32>) {
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "aux", reductions = "last"}} : (tensor<i32>) -> tensor<i32>
    // expected-error@+1 {{result 1 of the step depends on bactrian.microbatch_index() without passing the boundary}}
    %m = stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<i32>
    return %b, %m : tensor<i32>, tensor<i32>
  }
}

// -----

// A branch that captures a batch value reads it, too.
module @captured_value_bypasses_the_boundary {
  func.func public @main(%i: tensor<i32> {bactrian.role = "constant"}, %x: tensor<i32> {bactrian.role = "batch"})
      -> (tensor<i32>, tensor<i32>) {
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "aux", reductions = "last"}} : (tensor<i32>) -> tensor<i32>
    // expected-error@+1 {{without passing the boundary}}
    %c = "stablehlo.case"(%i) ({
      stablehlo.return %x : tensor<i32>
    }) : (tensor<i32>) -> tensor<i32>
    return %b, %c : tensor<i32>, tensor<i32>
  }
}

// -----

// The number is an op of @main only after it was taken out of the branch.
module @microbatch_index_in_a_branch_below_the_boundary {
  func.func public @main(%i: tensor<i32> {bactrian.role = "constant"}, %x: tensor<i32> {bactrian.role = "batch"})
      -> (tensor<i32>, tensor<i32>) {
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "aux", reductions = "last"}} : (tensor<i32>) -> tensor<i32>
    // expected-error@+1 {{stablehlo.case below the gradient boundary depends on bactrian.microbatch_index() without passing the boundary}}
    %c = "stablehlo.case"(%i) ({
      %m = stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<i32>
      stablehlo.return %m : tensor<i32>
    }) : (tensor<i32>) -> tensor<i32>
    return %b, %c : tensor<i32>, tensor<i32>
  }
}
