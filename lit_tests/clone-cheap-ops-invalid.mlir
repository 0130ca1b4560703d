// RUN: bactrian-opt %s --clone-cheap-ops --split-input-file --verify-diagnostics

// expected-error@unknown {{the module has no @main}}
module @no_main {
}

// -----

// expected-error@unknown {{run assign-stages first}}
module @no_stage {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}
