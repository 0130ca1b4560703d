// RUN: bactrian-opt %s --hoist-invariants --split-input-file --verify-diagnostics
// RUN: not bactrian-opt %s --hoist-invariants=skip=last 2>&1 | FileCheck %s --check-prefix=SKIP
// SKIP: option skip of hoist-invariants is 'last', must be numbers of stages

// expected-error@+1 {{bactrian.num_microbatches is missing}}
module @no_number_of_microbatches attributes {bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @no_stage attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{run assign-stages first}}
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @prepared_of_the_batch attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{the prepare phase reads an argument of the batch}}
    %y = stablehlo.sine %x {bactrian.phase = "prepare", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @prepared_of_a_microbatch attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "state"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // expected-error@+1 {{the prepare phase reads a forward value}}
    %z = stablehlo.sine %y {bactrian.phase = "prepare", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %z : tensor<4xf32>
  }
}
