// RUN: bactrian-opt %s --clone-cheap-ops --split-input-file --verify-diagnostics

// expected-error@+1 {{the module has no @main}}
module @no_main {
}

// -----

module @no_stage {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{run assign-stages first}}
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}
