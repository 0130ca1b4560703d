// RUN: bactrian-opt %s --select-residuals --split-input-file --verify-diagnostics

// expected-error@+1 {{the module has no @main}}
module @no_main {
}

// -----

module @no_stage attributes {bactrian.num_stages = 1 : i64} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{run assign-stages first}}
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

// expected-error@+1 {{run assign-stages first}}
module @no_number_of_stages {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}
