// RUN: bactrian-opt %s --partition --split-input-file | FileCheck %s

// Contracting dims are sharded: partial sums are added up where they are read whole, and scattered where a shard is.
// CHECK-LABEL: module @products
module @products {
  sdy.mesh @stage0 = <["data"=2, "model"=4]>
  // CHECK: func.func private @stage0.forward(%[[X:.*]]: tensor<8x16xf32> {sdy.sharding
  func.func private @stage0.forward(%x: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {"model"}]>}, %w: tensor<16x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"model"}, {}]>})
      -> (tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}, tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {"model"}]>}) {
    // CHECK-NEXT: sdy.manual_computation(%[[X]], %{{.*}}) {{.*}} manual_axes={"data", "model"} (%[[XS:.*]]: tensor<4x4xf32>, %[[WS:.*]]: tensor<4x8xf32>)
    // CHECK-NEXT: %[[P:.*]] = stablehlo.dot_general %[[XS]], %[[WS]], contracting_dims = [1] x [0] : (tensor<4x4xf32>, tensor<4x8xf32>) -> tensor<4x8xf32>
    // CHECK-NEXT: %[[S:.*]] = "stablehlo.all_reduce"(%[[P]]) {{.*}}replica_groups = dense<{{\[\[}}0, 1, 2, 3], [4, 5, 6, 7{{\]\]}}>
    // CHECK: stablehlo.add
    // CHECK: }) : (tensor<4x8xf32>) -> tensor<4x8xf32>
    // CHECK: %[[C:.*]] = stablehlo.cosine %[[XS]]
    // CHECK-NEXT: %[[Q:.*]] = stablehlo.dot_general %[[C]], %[[WS]]
    // CHECK-NEXT: %[[R:.*]] = "stablehlo.reduce_scatter"(%[[Q]]) {{.*}}scatter_dimension = 1
    // CHECK: }) : (tensor<4x8xf32>) -> tensor<4x2xf32>
    // CHECK-NEXT: sdy.return %[[S]], %[[R]] : tensor<4x8xf32>, tensor<4x2xf32>
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : (tensor<8x16xf32>, tensor<16x8xf32>) -> tensor<8x8xf32>
    %c = stablehlo.cosine %x {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {"model"}]>]>} : tensor<8x16xf32>
    %p = stablehlo.dot_general %c, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : (tensor<8x16xf32>, tensor<16x8xf32>) -> tensor<8x8xf32>
    %z = sdy.reshard %p <@stage0, [{"data"}, {"model"}]> : tensor<8x8xf32>
    return %y, %z : tensor<8x8xf32>, tensor<8x8xf32>
  }
}

// -----

// Each reshard is one collective, or the slice that begins at the device's own place.
// CHECK-LABEL: module @reshards
module @reshards {
  sdy.mesh @stage0 = <["a"=2, "b"=2]>
  func.func private @stage0.forward(%x: tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"a"}, {}]>}) -> (tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    // CHECK: %[[N:.*]] = stablehlo.partition_id
    // CHECK: stablehlo.dynamic_slice {{.*}} sizes = [4, 4] : (tensor<4x8xf32>, tensor<i32>, tensor<i32>) -> tensor<4x4xf32>
    %0 = sdy.reshard %x <@stage0, [{"a"}, {"b"}]> : tensor<8x8xf32>
    // CHECK: "stablehlo.collective_permute"({{.*}}) {{.*}}source_target_pairs = dense<{{\[\[}}0, 0], [2, 1], [1, 2], [3, 3{{\]\]}}>
    %1 = sdy.reshard %0 <@stage0, [{"b"}, {"a"}]> : tensor<8x8xf32>
    // CHECK: "stablehlo.all_to_all"({{.*}}) {{.*}}concat_dimension = 1 : i64{{.*}}split_dimension = 0 : i64{{.*}}: (tensor<4x4xf32>) -> tensor<2x8xf32>
    %2 = sdy.reshard %1 <@stage0, [{"b", "a"}, {}]> : tensor<8x8xf32>
    // CHECK: "stablehlo.all_gather"({{.*}}) {{.*}}all_gather_dim = 0 : i64{{.*}}replica_groups = dense<{{\[\[}}0, 2, 1, 3{{\]\]}}>{{.*}}: (tensor<2x8xf32>) -> tensor<8x8xf32>
    %3 = sdy.reshard %2 <@stage0, [{}, {}]> : tensor<8x8xf32>
    return %3 : tensor<8x8xf32>
  }
}

// -----

// What each device makes of its own place: an iota begins at its row; a constant of one number has fewer of it.
// CHECK-LABEL: module @sources
module @sources {
  sdy.mesh @stage0 = <["data"=4]>
  func.func private @stage0.forward() -> (tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
    // CHECK: %[[I:.*]] = stablehlo.iota dim = 0 : tensor<2x4xi32>
    // CHECK: stablehlo.add %[[I]]
    // CHECK: stablehlo.convert {{.*}} : (tensor<2x4xi32>) -> tensor<2x4xf32>
    // CHECK: stablehlo.constant dense<2.000000e+00> : tensor<2x4xf32>
    %i = stablehlo.iota dim = 0 {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : tensor<8x4xf32>
    %c = stablehlo.constant {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} dense<2.0> : tensor<8x4xf32>
    %r = stablehlo.multiply %i, %c {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : tensor<8x4xf32>
    return %r : tensor<8x4xf32>
  }
}

// -----

// A loop carries shards. A sum that stays unreduced is added up once, behind the loop.
// CHECK-LABEL: module @loop
module @loop {
  sdy.mesh @stage0 = <["data"=4]>
  func.func private @stage0.forward(%x: tensor<16x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
    %zero = stablehlo.constant dense<0> : tensor<i32>
    %one = stablehlo.constant dense<1> : tensor<i32>
    %three = stablehlo.constant dense<3> : tensor<i32>
    %zeros = stablehlo.constant {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}], unreduced={"data"}>]>} dense<0.0> : tensor<8x8xf32>
    // CHECK: stablehlo.while({{.*}}) : tensor<i32>, tensor<8x8xf32>
    %r:2 = stablehlo.while(%i = %zero, %s = %zeros) : tensor<i32>, tensor<8x8xf32> attributes {sdy.sharding = #sdy.sharding_per_value<[<@stage0, []>, <@stage0, [{}, {}], unreduced={"data"}>]>}
     cond {
      %c = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    } do {
      // CHECK: stablehlo.dot_general {{.*}} : (tensor<4x8xf32>, tensor<4x8xf32>) -> tensor<8x8xf32>
      // CHECK-NOT: all_reduce
      // CHECK: stablehlo.return
      %p = stablehlo.dot_general %x, %x, contracting_dims = [0] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}], unreduced={"data"}>]>} : (tensor<16x8xf32>, tensor<16x8xf32>) -> tensor<8x8xf32>
      %t = stablehlo.add %s, %p {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}], unreduced={"data"}>]>} : tensor<8x8xf32>
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %t : tensor<i32>, tensor<8x8xf32>
    }
    // CHECK: "stablehlo.all_reduce"
    %s = sdy.reshard %r#1 <@stage0, [{}, {}]> : tensor<8x8xf32>
    return %s : tensor<8x8xf32>
  }
}

// -----

// A row that is looked up is its device's, as bits that are zeros on the others. Updates beyond a shard are dropped.
// CHECK-LABEL: module @rows
module @rows {
  sdy.mesh @stage0 = <["data"=4]>
  func.func private @stage0.forward(%x: tensor<8x3xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}, %i: tensor<5x1xi32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}, %u: tensor<5x3xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>})
      -> (tensor<5x3xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}, tensor<8x3xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
    // CHECK: %[[LAST:.*]] = stablehlo.constant dense<7> : tensor<i32>
    // CHECK-NEXT: %[[WHOLE:.*]] = stablehlo.clamp %{{.*}}, %{{.*}}, %[[LAST]]
    // CHECK: %[[ROW:.*]] = stablehlo.subtract %[[WHOLE]], %{{.*}} : tensor<5x1xi32>
    // CHECK: %[[MADE:.*]] = "stablehlo.gather"(%{{.*}}, %[[ROW]]) {{.*}} : (tensor<2x3xf32>, tensor<5x1xi32>) -> tensor<5x3xf32>
    // CHECK: %[[BITS:.*]] = stablehlo.bitcast_convert %[[MADE]] : (tensor<5x3xf32>) -> tensor<5x3xi32>
    // CHECK: %[[OWN:.*]] = stablehlo.select %{{.*}}, %[[BITS]], %{{.*}}
    // CHECK-NEXT: "stablehlo.all_reduce"(%[[OWN]])
    %g = "stablehlo.gather"(%x, %i) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 3>}> {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<8x3xf32>, tensor<5x1xi32>) -> tensor<5x3xf32>
    // CHECK: %[[SIDE:.*]] = stablehlo.constant dense<8> : tensor<i32>
    // CHECK-NEXT: stablehlo.clamp %{{.*}}, %{{.*}}, %[[SIDE]]
    // CHECK-NOT: all_reduce
    // CHECK: "stablehlo.scatter"(%{{.*}}) {{.*}}
    // CHECK: }) : (tensor<2x3xf32>, tensor<5x1xi32>, tensor<5x3xf32>) -> tensor<2x3xf32>
    %s = "stablehlo.scatter"(%x, %i, %u) <{scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      stablehlo.return %b : tensor<f32>
    }) {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : (tensor<8x3xf32>, tensor<5x1xi32>, tensor<5x3xf32>) -> tensor<8x3xf32>
    return %g, %s : tensor<5x3xf32>, tensor<8x3xf32>
  }
}

// -----

// A slice that would reach beyond the whole dim is moved to its end before its rows are looked for in the shards.
// CHECK-LABEL: module @slices
module @slices {
  sdy.mesh @stage0 = <["data"=4]>
  func.func private @stage0.forward(%x: tensor<16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}, %i: tensor<i32> {sdy.sharding = #sdy.sharding<@stage0, []>})
      -> (tensor<3xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}]>}, tensor<16xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) {
    // CHECK: %[[END:.*]] = stablehlo.constant dense<13> : tensor<i32>
    // CHECK-NEXT: stablehlo.clamp %{{.*}}, %{{.*}}, %[[END]]
    // CHECK: stablehlo.dynamic_slice {{.*}} sizes = [3] : (tensor<4xf32>, tensor<i32>) -> tensor<3xf32>
    // CHECK: stablehlo.pad {{.*}} -> tensor<9xi32>
    // CHECK: "stablehlo.all_reduce"
    %s = stablehlo.dynamic_slice %x, %i, sizes = [3] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}]>]>} : (tensor<16xf32>, tensor<i32>) -> tensor<3xf32>
    // CHECK: stablehlo.select
    // CHECK-NEXT: stablehlo.dynamic_update_slice {{.*}} : (tensor<4xf32>, tensor<3xf32>, tensor<i32>) -> tensor<4xf32>
    %u = stablehlo.dynamic_update_slice %x, %s, %i {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}]>]>} : (tensor<16xf32>, tensor<3xf32>, tensor<i32>) -> tensor<16xf32>
    return %s, %u : tensor<3xf32>, tensor<16xf32>
  }
}

// -----

// Beside a stage of several devices, one of one device loses its shardings.
// CHECK-LABEL: module @one_device_beside_two
module @one_device_beside_two {
  sdy.mesh @stage0 = <["data"=2]>
  sdy.mesh @stage1 = <["data"=1]>
  // CHECK: func.func private @stage0.forward({{.*}}sdy.sharding
  // CHECK-NEXT: sdy.manual_computation
  func.func private @stage0.forward(%x: tensor<8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) -> (tensor<8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) {
    %y = stablehlo.sine %x {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}]>]>} : tensor<8xf32>
    return %y : tensor<8xf32>
  }
  // CHECK: func.func private @stage1.forward(%[[X:.*]]: tensor<8xf32> {tf.aliasing_output = 0 : i32}) -> tensor<8xf32>
  // CHECK-NEXT: %[[Y:.*]] = stablehlo.sine %[[X]] : tensor<8xf32>
  // CHECK-NEXT: return %[[Y]]
  func.func private @stage1.forward(%x: tensor<8xf32> {sdy.sharding = #sdy.sharding<@stage1, [{}]>, tf.aliasing_output = 0 : i32}) -> (tensor<8xf32> {sdy.sharding = #sdy.sharding<@stage1, [{}]>}) {
    %y = stablehlo.sine %x {sdy.sharding = #sdy.sharding_per_value<[<@stage1, [{}]>]>} : tensor<8xf32>
    %z = sdy.reshard %y <@stage1, [{}]> : tensor<8xf32>
    return %z : tensor<8xf32>
  }
}

// -----

// A stage of one device stays as it is.
// CHECK-LABEL: module @one_device
module @one_device {
  sdy.mesh @stage0 = <["data"=1]>
  // CHECK: func.func private @stage0.forward
  // CHECK-NEXT: stablehlo.sine
  func.func private @stage0.forward(%x: tensor<8xf32>) -> tensor<8xf32> {
    %y = stablehlo.sine %x : tensor<8xf32>
    return %y : tensor<8xf32>
  }
}

// -----

// A kernel is read backwards by a reversal on each device, behind what gathers it.
// CHECK-LABEL: module @reversed
module @reversed {
  sdy.mesh @stage0 = <["data"=2]>
  // CHECK: sdy.manual_computation{{.*}} (%[[X:.*]]: tensor<1x8x2xf32>, %[[K:.*]]: tensor<3x2x1xf32>)
  // CHECK-NEXT: %[[WHOLE:.*]] = "stablehlo.all_gather"(%[[K]])
  // CHECK: %[[R:.*]] = stablehlo.reverse %[[WHOLE]], dims = [0] : tensor<3x2x2xf32>
  // CHECK-NEXT: stablehlo.convolution(%[[X]], %[[R]])
  // CHECK-NOT: reverse = [true]
  func.func private @stage0.forward(%x: tensor<2x8x2xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}, {}]>}, %k: tensor<3x2x2xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}, {"data"}]>})
      -> (tensor<2x6x2xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}, {}]>}) {
    %w = sdy.reshard %k <@stage0, [{}, {}, {}]> : tensor<3x2x2xf32>
    %y = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f], window = {reverse = [true]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64, sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}, {}]>]>} : (tensor<2x8x2xf32>, tensor<3x2x2xf32>) -> tensor<2x6x2xf32>
    return %y : tensor<2x6x2xf32>
  }
}
