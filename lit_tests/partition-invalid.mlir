// RUN: bactrian-opt %s --partition --split-input-file --verify-diagnostics

module @no_form {
  sdy.mesh @stage0 = <["data"=2]>
  func.func private @stage0.forward(%x: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
    // expected-error@+1 {{there is no form of stablehlo.custom_call on shards}}
    %y = stablehlo.custom_call @somebodys(%x) {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : (tensor<8x4xf32>) -> tensor<8x4xf32>
    return %y : tensor<8x4xf32>
  }
}

// -----

module @operands_differ {
  sdy.mesh @stage0 = <["data"=2]>
  func.func private @stage0.forward(%x: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}, %w: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) -> (tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
    // expected-error@+1 {{no form of stablehlo.add reads and makes these shardings}}
    %y = stablehlo.add %x, %w {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : tensor<8x4xf32>
    return %y : tensor<8x4xf32>
  }
}

// -----

module @sum_of_unreduced_values {
  sdy.mesh @stage0 = <["data"=2]>
  func.func private @stage0.forward(%x: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    %p = stablehlo.dot_general %x, %x, contracting_dims = [0] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}], unreduced={"data"}>]>} : (tensor<8x4xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
    // expected-error@+1 {{stablehlo.sine reads an unreduced value, but is not linear}}
    %y = stablehlo.sine %p {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}], unreduced={"data"}>]>} : tensor<4x4xf32>
    %z = sdy.reshard %y <@stage0, [{}, {}]> : tensor<4x4xf32>
    return %z : tensor<4x4xf32>
  }
}

// -----

module @does_not_divide {
  sdy.mesh @stage0 = <["data"=4]>
  func.func private @stage0.forward(%x: tensor<8x6xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<8x6xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    // expected-error@+1 {{sharding -,data does not split tensor<8x6xf32> into equal shards}}
    %y = sdy.reshard %x <@stage0, [{}, {"data"}]> : tensor<8x6xf32>
    %z = sdy.reshard %y <@stage0, [{}, {}]> : tensor<8x6xf32>
    return %z : tensor<8x6xf32>
  }
}

// -----

module @argument_does_not_divide {
  sdy.mesh @stage0 = <["data"=4]>
  // expected-error@+1 {{sharding data does not split tensor<6xf32> into equal shards}}
  func.func private @stage0.forward(%x: tensor<6xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) -> (tensor<6xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) {
    return %x : tensor<6xf32>
  }
}
