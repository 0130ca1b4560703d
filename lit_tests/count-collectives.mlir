// RUN: bactrian-opt %s --partition --count-collectives --split-input-file | FileCheck %s

// A sum over a dim sharded in two, sharded afterwards: one reduce-scatter of 1/2 of 64 bytes; and an all-gather of 32 bytes.
// CHECK: module @scatter attributes {bactrian.sent_bytes = {all_gather = 32 : i64, reduce_scatter = 32 : i64}}
module @scatter {
  sdy.mesh @stage0 = <["data"=2, "model"=1]>
  func.func private @stage0.forward(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %w: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    %0 = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
    %1 = sdy.reshard %0 <@stage0, [{"data"}, {}]> : tensor<4x4xf32>
    %2 = stablehlo.sine %1 {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : tensor<4x4xf32>
    %3 = sdy.reshard %2 <@stage0, [{}, {}]> : tensor<4x4xf32>
    return %3 : tensor<4x4xf32>
  }
}

// -----

// Nothing is sharded, nothing is sent.
// CHECK: module @nothing attributes {bactrian.sent_bytes = {}}
module @nothing {
  func.func private @stage0.forward(%x: tensor<4xf32>) -> tensor<4xf32> {
    %0 = stablehlo.sine %x : tensor<4xf32>
    return %0 : tensor<4xf32>
  }
}

// -----

// In a loop that runs three times: three reduce-scatters of 1/2 of 64 bytes; two loops deep six gathers of 32 bytes.
// CHECK: module @loops attributes {bactrian.sent_bytes = {all_gather = 192 : i64, reduce_scatter = 96 : i64}}
module @loops {
  sdy.mesh @stage0 = <["data"=2]>
  func.func private @stage0.forward(%x: tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
    %zero = stablehlo.constant dense<0> : tensor<i32>
    %one = stablehlo.constant dense<1> : tensor<i32>
    %two = stablehlo.constant dense<2> : tensor<i32>
    %three = stablehlo.constant dense<3> : tensor<i32>
    %r:2 = stablehlo.while(%i = %zero, %z = %x) : tensor<i32>, tensor<4x4xf32> attributes {sdy.sharding = #sdy.sharding_per_value<[<@stage0, []>, <@stage0, [{"data"}, {}]>]>}
     cond {
      %c = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    } do {
      %p = stablehlo.dot_general %z, %z, contracting_dims = [0] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
      %k = sdy.reshard %p <@stage0, [{"data"}, {}]> : tensor<4x4xf32>
      %q:2 = stablehlo.while(%n = %zero, %y = %k) : tensor<i32>, tensor<4x4xf32> attributes {sdy.sharding = #sdy.sharding_per_value<[<@stage0, []>, <@stage0, [{"data"}, {}]>]>}
       cond {
        %c = stablehlo.compare LT, %n, %two : (tensor<i32>, tensor<i32>) -> tensor<i1>
        stablehlo.return %c : tensor<i1>
      } do {
        %g = sdy.reshard %y <@stage0, [{}, {}]> : tensor<4x4xf32>
        %t = stablehlo.transpose %g, dims = [1, 0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x4xf32>) -> tensor<4x4xf32>
        %s = sdy.reshard %t <@stage0, [{"data"}, {}]> : tensor<4x4xf32>
        %m = stablehlo.add %n, %one : tensor<i32>
        stablehlo.return %m, %s : tensor<i32>, tensor<4x4xf32>
      }
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %q#1 : tensor<i32>, tensor<4x4xf32>
    }
    return %r#1 : tensor<4x4xf32>
  }
}

// -----

// Borders of a cut image, which Shardy leaves to XLA: with windows of 5 every second row of 4 x 4 numbers, 1 row of 4-byte
// numbers from before and 2 from behind. The pooling that follows has windows of 2 apart from each other, and none; so has
// its gradient, whose other operand is not gathered.
// CHECK: module @borders attributes {bactrian.sent_bytes = {collective_permute = 192 : i64}}
module @borders {
  sdy.mesh @stage0 = <["rows"=2]>
  func.func private @stage0.forward(%x: tensor<16x4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"rows"}, {}, {}]>}, %k: tensor<5x4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}, {}]>}, %g: tensor<4x4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"rows"}, {}, {}]>}) -> (tensor<8x4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"rows"}, {}, {}]>}) {
    %zero = stablehlo.constant dense<0.0> : tensor<f32>
    %y = stablehlo.convolution(%x, %k) dim_numbers = [0, b, f]x[0, i, o]->[0, b, f], window = {stride = [2], pad = [[1, 2]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64, sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"rows"}, {}, {}]>]>} : (tensor<16x4x4xf32>, tensor<5x4x4xf32>) -> tensor<8x4x4xf32>
    %z = "stablehlo.reduce_window"(%y, %zero) <{window_dimensions = array<i64: 2, 1, 1>, window_strides = array<i64: 2, 1, 1>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %m = stablehlo.maximum %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }) {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"rows"}, {}, {}]>]>} : (tensor<8x4x4xf32>, tensor<f32>) -> tensor<4x4x4xf32>
    %s = stablehlo.multiply %z, %g {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"rows"}, {}, {}]>]>} : tensor<4x4x4xf32>
    %r = "stablehlo.select_and_scatter"(%y, %s, %zero) <{window_dimensions = array<i64: 2, 1, 1>, window_strides = array<i64: 2, 1, 1>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %c = stablehlo.compare GE, %a, %b : (tensor<f32>, tensor<f32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    }, {
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %m = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }) {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"rows"}, {}, {}]>]>} : (tensor<8x4x4xf32>, tensor<4x4x4xf32>, tensor<f32>) -> tensor<8x4x4xf32>
    return %r : tensor<8x4x4xf32>
  }
}
