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

// -----

// expected-error@+1 {{bactrian.remat has 1 words, the program has 2 layers}}
module @too_few_words attributes {bactrian.num_layers = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.remat = ["all"]} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

// expected-error@+1 {{must be a list of none, products, all, one for each layer}}
module @no_such_word attributes {bactrian.num_layers = 1 : i64, bactrian.num_stages = 1 : i64, bactrian.remat = ["some"]} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}
