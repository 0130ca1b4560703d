// RUN: bactrian-opt %s --flatten-calls --split-input-file --verify-diagnostics

// expected-error@+1 {{the module has no @main}}
func.func public @other(%arg0: tensor<f32>) -> tensor<f32> {
  return %arg0 : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @f(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
func.func private @f(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @g(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
func.func private @g(%arg0: tensor<f32>) -> tensor<f32> {
  // expected-error@+1 {{cannot flatten the recursive function @f}}
  %0 = call @f(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @external(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
// expected-error@+1 {{cannot flatten @external: it has 0 blocks, needs exactly 1}}
func.func private @external(tensor<f32>) -> tensor<f32>

// -----

func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @branches(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
// expected-error@+1 {{cannot flatten @branches: it has 2 blocks, needs exactly 1}}
func.func private @branches(%arg0: tensor<f32>) -> tensor<f32> {
  cf.br ^next(%arg0 : tensor<f32>)
^next(%0: tensor<f32>):
  return %0 : tensor<f32>
}
