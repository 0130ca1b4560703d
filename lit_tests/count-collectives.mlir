// RUN: bactrian-opt %s --count-collectives --split-input-file | FileCheck %s

// A sum over a dim cut in two, cut afterwards: one reduce-scatter of 1/2 of 64 bytes; and an all-gather of 32 bytes.
// CHECK: module @scatter attributes {bactrian.sent_bytes = {all_gather = 32 : i64, reduce_scatter = 32 : i64}}
module @scatter {
  sdy.mesh @stage0 = <["data"=2, "model"=1]>
  func.func public @main(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %w: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    %0 = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
    %1 = sdy.reshard %0 <@stage0, [{"data"}, {}]> : tensor<4x4xf32>
    %2 = stablehlo.sine %1 {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : tensor<4x4xf32>
    %3 = sdy.reshard %2 <@stage0, [{}, {}]> : tensor<4x4xf32>
    return %3 : tensor<4x4xf32>
  }
}

// -----

// Nothing is cut, nothing is sent.
// CHECK: module @nothing attributes {bactrian.sent_bytes = {}}
module @nothing {
  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.sine %x : tensor<4xf32>
    return %0 : tensor<4xf32>
  }
}
