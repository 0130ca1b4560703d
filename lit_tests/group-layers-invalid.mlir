// RUN: bactrian-opt %s --group-layers=num-layers=3 --split-input-file --verify-diagnostics

// expected-error@+1 {{cannot make 3 layers: the forward phase has 1 matrix product or convolution}}
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.role = "constant"}) -> tensor<4x16xf32> {
  %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %b = stablehlo.tanh %a {bactrian.phase = "forward"} : tensor<4x16xf32>
  %c = stablehlo.tanh %b {bactrian.phase = "forward"} : tensor<4x16xf32>
  return %c : tensor<4x16xf32>
}

// -----

// Without products, ops that depend on the batch count.
// expected-error@+1 {{cannot make 3 layers: the forward phase has 2 ops that depend on the batch}}
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<4x16xf32> {bactrian.role = "constant"}) -> tensor<4x16xf32> {
  %a = stablehlo.tanh %v {bactrian.phase = "forward"} : tensor<4x16xf32>
  %b = stablehlo.add %a, %x {bactrian.phase = "forward"} : tensor<4x16xf32>
  %c = stablehlo.tanh %b {bactrian.phase = "forward"} : tensor<4x16xf32>
  return %c : tensor<4x16xf32>
}

// -----

// expected-error@+1 {{cannot make 3 layers: the program has 1 stage boundary}}
func.func public @main(%x: tensor<4x4xf32> {bactrian.role = "batch"}) -> tensor<4x4xf32> {
  %a = stablehlo.tanh %x {bactrian.phase = "forward"} : tensor<4x4xf32>
  %b = stablehlo.custom_call @bactrian.stage_boundary(%a) {bactrian.phase = "forward"} : (tensor<4x4xf32>) -> tensor<4x4xf32>
  %c = stablehlo.tanh %b {bactrian.phase = "forward"} : tensor<4x4xf32>
  %d = stablehlo.tanh %c {bactrian.phase = "forward"} : tensor<4x4xf32>
  return %d : tensor<4x4xf32>
}

// -----

// The second program reads the arguments in another order than the one that placed them.
module attributes {bactrian.num_stages = 3 : i64} {
  func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.pinned_stages = [0], bactrian.role = "constant"}, %w: tensor<16x16xf32> {bactrian.pinned_stages = [1], bactrian.role = "constant"}, %s: tensor<16x16xf32> {bactrian.pinned_stages = [2], bactrian.role = "constant"}) -> tensor<4x16xf32> {
    %a = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    // expected-error@+1 {{cannot leave the arguments on the 3 stages that hold them}}
    %b = stablehlo.dot_general %a, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %c = stablehlo.dot_general %b, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    return %c : tensor<4x16xf32>
  }
}

// -----

// One op reads arguments of two stages.
module attributes {bactrian.num_stages = 3 : i64} {
  func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.pinned_stages = [0], bactrian.role = "constant"}, %w: tensor<16x16xf32> {bactrian.pinned_stages = [1], bactrian.role = "constant"}) -> tensor<4x16xf32> {
    // expected-error@+1 {{cannot leave the arguments on the 3 stages that hold them}}
    %s = stablehlo.add %v, %w {bactrian.phase = "forward"} : tensor<16x16xf32>
    %a = stablehlo.dot_general %x, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %b = stablehlo.dot_general %a, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %c = stablehlo.dot_general %b, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    return %c : tensor<4x16xf32>
  }
}
