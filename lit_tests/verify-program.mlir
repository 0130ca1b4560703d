// RUN: bactrian-opt %s --verify-program --split-input-file | FileCheck %s

// Every reduction: concat makes dim 0 num_microbatches times as long, the others keep the type.
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.custom_call @bactrian.gradient_boundary
module attributes {bactrian.num_microbatches = 4 : i64} {
  func.func public @main(%arg0: tensor<8xf32> {bactrian.role = "state"}, %arg1: tensor<2x8xf32> {bactrian.role = "batch"},
                         %arg2: tensor<8xf32> {bactrian.role = "constant"})
      -> (tensor<8xf32> {bactrian.updates = 0 : i64}, tensor<8x8xf32>, tensor<i32>) {
    %index = stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<i32>
    %0:4 = stablehlo.custom_call @bactrian.gradient_boundary(%arg0, %arg1, %index, %index) {mhlo.backend_config =
        {kinds = "gradient,aux,aux,aux", reductions = "mean,concat,sum,last"}}
        : (tensor<8xf32>, tensor<2x8xf32>, tensor<i32>, tensor<i32>) -> (tensor<8xf32>, tensor<8x8xf32>, tensor<i32>, tensor<i32>)
    %1 = stablehlo.multiply %0#0, %arg2 : tensor<8xf32>
    %2 = stablehlo.subtract %arg0, %1 : tensor<8xf32>
    return %2, %0#1, %0#2 : tensor<8xf32>, tensor<8x8xf32>, tensor<i32>
  }
}

// -----

// A value that depends on no batch argument may be read on both sides; dead code below the boundary hurts nobody.
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.tanh
func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"})
    -> (tensor<f32> {bactrian.updates = 0 : i64}) {
  %0 = stablehlo.tanh %arg0 : tensor<f32>
  %1 = stablehlo.multiply %0, %arg1 : tensor<f32>
  %2 = stablehlo.custom_call @bactrian.gradient_boundary(%1)
      {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  %3 = stablehlo.subtract %0, %2 : tensor<f32>
  %dead = stablehlo.subtract %arg1, %2 : tensor<f32>
  return %3 : tensor<f32>
}

// -----

// A custom call that is known to be pure may say that it has side effects.
// CHECK-LABEL: func.func public @main
// CHECK: custom_call @Sharding
func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %0 = stablehlo.custom_call @Sharding(%arg0) {has_side_effect = true} : (tensor<f32>) -> tensor<f32>
  %1 = stablehlo.custom_call @bactrian.gradient_boundary(%0)
      {mhlo.backend_config = {kinds = "output", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %1 : tensor<f32>
}
