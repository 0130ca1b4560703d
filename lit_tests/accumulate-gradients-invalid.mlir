// RUN: bactrian-opt %s --accumulate-gradients --split-input-file --verify-diagnostics

// expected-error@+1 {{bactrian.num_microbatches is missing}}
module @no_number_of_microbatches {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %g = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "sum"}}
      : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @no_boundary attributes {bactrian.num_microbatches = 2 : i64} {
  // expected-error@+1 {{@main has no gradient boundary}}
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    return %x : tensor<4xf32>
  }
}
