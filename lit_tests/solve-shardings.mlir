// RUN: bactrian-opt %s --pass-pipeline='builtin.module(func.func(sdy-populate-op-sharding-rules),solve-shardings{time-limit=30})' --split-input-file | FileCheck %s

// RUN: bactrian-opt %s --pass-pipeline='builtin.module(func.func(sdy-populate-op-sharding-rules),solve-shardings{strategy=zero3 compare=true})' --split-input-file | FileCheck %s --check-prefix=ZERO

// Parameters, and what is added to them, are cut; the choice is compared with all known plans.
// ZERO-LABEL: module @data_parallel
// ZERO-SAME: compared = [{communication_seconds = {{.*}}, memory_bytes = {{.*}}, name = "data", seconds = {{.*}}}, {{.*}}name = "megatron"
// ZERO-SAME: strategy = "zero3"
// ZERO: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}

// With all of the batch everywhere, every device has some columns of the weight, of the product and of the gradient:
// nothing is sent at all.
// CHECK-LABEL: module @columns
module @columns attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // CHECK: tensor<65536x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}
  // CHECK-SAME: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}
  // CHECK-NOT: sdy.reshard
  // CHECK: return
  func.func public @main(%x: tensor<65536x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> (tensor<64x64xf32> {bactrian.updates = 1 : i64}) {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<65536x64xf32>, tensor<64x64xf32>) -> tensor<65536x64xf32>
    %g = stablehlo.dot_general %x, %y, contracting_dims = [0] x [0] {bactrian.phase = "backward"} : (tensor<65536x64xf32>, tensor<65536x64xf32>) -> tensor<64x64xf32>
    %n = stablehlo.subtract %w, %g {bactrian.phase = "update"} : tensor<64x64xf32>
    return %n : tensor<64x64xf32>
  }
}

// -----

// A large batch and a small weight: the batch is cut, the weight's gradient is reduced once, the update is whole.
// CHECK-LABEL: module @data_parallel
module @data_parallel attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // CHECK: @main(%[[X:[^:]*]]: tensor<65536x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}
  // CHECK-SAME: %[[W:[^:]*]]: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}
  // CHECK-SAME: -> (tensor<64x64xf32> {bactrian.updates = 1 : i64, sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>})
  // CHECK: stablehlo.dot_general %[[X]], %[[W]]
  // CHECK-SAME: <@stage0, [{"data"}, {}]>
  // CHECK-NOT: sdy.reshard
  // CHECK: stablehlo.dot_general
  // CHECK-SAME: contracting_dims = [0] x [0]
  // CHECK-SAME: <@stage0, [{}, {}]>
  // CHECK-NOT: sdy.reshard
  // CHECK-NOT: sdy.sharding_rule
  // CHECK: return
  func.func public @main(%x: tensor<65536x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> (tensor<64x64xf32> {bactrian.updates = 1 : i64}) {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<65536x64xf32>, tensor<64x64xf32>) -> tensor<65536x64xf32>
    %g = stablehlo.dot_general %x, %y, contracting_dims = [0] x [0] {bactrian.phase = "backward"} : (tensor<65536x64xf32>, tensor<65536x64xf32>) -> tensor<64x64xf32>
    %n = stablehlo.subtract %w, %g {bactrian.phase = "update"} : tensor<64x64xf32>
    return %n : tensor<64x64xf32>
  }
}

// -----

// What somebody has decided stays: the weight is cut by columns, and the product is wanted whole. It is made by rows, which
// takes a gather of the small weight, since its own gather along dim 1 would have a copy behind it. After that every device
// takes its own part of the work.
// CHECK-LABEL: module @given
module @given attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["model"=4]>
  // CHECK: %[[W:[^:]*]]: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {"model"}]>}
  // CHECK: sdy.reshard %[[W]] <@stage0, [{}, {}]>
  // CHECK: %[[Y:.*]] = stablehlo.dot_general
  // CHECK-SAME: <@stage0, [{"model"}, {}]>
  // CHECK: %[[C:.*]] = sdy.reshard %[[Y]] <@stage0, [{}, {}]>
  // CHECK: sdy.sharding_constraint %[[C]] <@stage0, [{}, {}]>
  // CHECK: sdy.reshard {{.*}} <@stage0, [{{{.*}}"model"{{.*}}}]>
  // CHECK-NEXT: stablehlo.sine
  func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}, %w: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {"model"}]>}) -> tensor<4096x64xf32> {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
    %c = sdy.sharding_constraint %y <@stage0, [{}, {}]> {bactrian.phase = "forward"} : tensor<4096x64xf32>
    %z = stablehlo.sine %c {bactrian.phase = "forward"} : tensor<4096x64xf32>
    return %z : tensor<4096x64xf32>
  }
}

// -----

// A mesh of one device: nothing to do.
// CHECK-LABEL: module @one_device
module @one_device attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=1]>
  // CHECK-NOT: sdy.sharding
  // CHECK: return
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

// Two stages: each is a program of its own, and what the second gets of the first is resharded from mesh to mesh.
// CHECK-LABEL: module @two_stages
// CHECK-SAME: bactrian.sharding = [{{{.*}}}, {{{.*}}}]
module @two_stages attributes {bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage0 = <["data"=2]>
  sdy.mesh @stage1 = <["model"=4]>
  // CHECK: tensor<4096x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}
  // CHECK: %[[Y:.*]] = stablehlo.sine {{.*}}<@stage0, [{"data"}, {}]>
  // CHECK: %[[R:.*]] = sdy.reshard %[[Y]] <@stage1, [{"model"}, {}]> {bactrian.phase = "forward", bactrian.stage = 1 : i64}
  // CHECK: stablehlo.cosine %[[R]] {{.*}}<@stage1, [{"model"}, {}]>
  func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch"}) -> tensor<4096x64xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4096x64xf32>
    %z = stablehlo.cosine %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4096x64xf32>
    return %z : tensor<4096x64xf32>
  }
}

// -----

// A loop over three stacked weights: its body is cut as the batch is. The weights, which no turn changes, are gathered
// once, before the loop; the sum of what each turn gives is reduced in every turn.
// CHECK-LABEL: module @loop
module @loop attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // CHECK: @main(%[[X:[^:]*]]: tensor<65536x64xf32>
  // CHECK-SAME: %[[W:[^:]*]]: tensor<3x64x64xf32>
  // CHECK: %[[ALL:.*]] = sdy.reshard %[[W]] <@stage0, [{}, {}, {}]> {bactrian.phase = "forward"}
  // CHECK: stablehlo.while(%[[I:[^ ]*]] = {{[^ ]*}}, %[[H:[^ ]*]] = %[[X]], %{{[^ ]*}} = %[[W]], %[[S:[^ ]*]] =
  // CHECK-SAME: sdy.sharding = #sdy.sharding_per_value<[<@stage0, []>, <@stage0, [{"data"}, {}]>, <@stage0, [{}, {"data"}, {}]>, <@stage0, [{}]>]>
  // CHECK: } do {
  // CHECK: stablehlo.dynamic_slice %[[ALL]], %[[I]]
  // CHECK: %[[P:.*]] = stablehlo.dot_general %[[H]]
  // CHECK-SAME: <@stage0, [{"data"}, {}]>
  // CHECK-NOT: sdy.reshard
  // CHECK: %[[R:.*]] = stablehlo.reduce(%[[P]] init: {{[^ ]*}}) applies stablehlo.add across dimensions = [0]
  // CHECK-SAME: <@stage0, [{}]>
  // CHECK: stablehlo.add %[[S]], %[[R]]
  // CHECK-NOT: sdy.reshard
  // CHECK-NOT: sdy.sharding_rule
  func.func public @main(%x: tensor<65536x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}, %w: tensor<3x64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}, {}]>}, %s: tensor<64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}]>}) -> (tensor<65536x64xf32>, tensor<64xf32> {bactrian.updates = 2 : i64}) {
    %zero = stablehlo.constant {bactrian.phase = "forward"} dense<0> : tensor<i32>
    %one = stablehlo.constant {bactrian.phase = "forward"} dense<1> : tensor<i32>
    %three = stablehlo.constant {bactrian.phase = "forward"} dense<3> : tensor<i32>
    %none = stablehlo.constant {bactrian.phase = "forward"} dense<0.0> : tensor<f32>
    %r:4 = stablehlo.while(%i = %zero, %h = %x, %ws = %w, %t = %s) : tensor<i32>, tensor<65536x64xf32>, tensor<3x64x64xf32>, tensor<64xf32> attributes {bactrian.phase = "forward"}
     cond {
      %c = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    } do {
      %d = stablehlo.dynamic_slice %ws, %i, %zero, %zero, sizes = [1, 64, 64] : (tensor<3x64x64xf32>, tensor<i32>, tensor<i32>, tensor<i32>) -> tensor<1x64x64xf32>
      %e = stablehlo.reshape %d : (tensor<1x64x64xf32>) -> tensor<64x64xf32>
      %p = stablehlo.dot_general %h, %e, contracting_dims = [1] x [0] : (tensor<65536x64xf32>, tensor<64x64xf32>) -> tensor<65536x64xf32>
      %q = stablehlo.reduce(%p init: %none) applies stablehlo.add across dimensions = [0] : (tensor<65536x64xf32>, tensor<f32>) -> tensor<64xf32>
      %u = stablehlo.add %t, %q : tensor<64xf32>
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %p, %ws, %u : tensor<i32>, tensor<65536x64xf32>, tensor<3x64x64xf32>, tensor<64xf32>
    }
    return %r#1, %r#3 : tensor<65536x64xf32>, tensor<64xf32>
  }
}

// -----

// What a loop of one stage hands on unchanged, another stage gets from where it comes from; the loop's own result is cut
// as its body is.
// CHECK-LABEL: module @loop_of_a_stage
module @loop_of_a_stage attributes {bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage0 = <["data"=2]>
  sdy.mesh @stage1 = <["model"=4]>
  // CHECK: @main({{.*}}, %[[W:[^:]*]]: tensor<64x64xf32>
  // CHECK: %[[R:[^ ]*]]:3 = stablehlo.while
  // CHECK-SAME: [<@stage0, []>, <@stage0, [{"data"}, {}]>, <@stage0, [{}, {}]>]
  // CHECK: stablehlo.dot_general %{{[^ ]*}}, %[[W]]
  // CHECK-SAME: <@stage0, [{"data"}, {}]>
  // CHECK-DAG: sdy.reshard %[[W]] <@stage1,
  // CHECK-DAG: sdy.reshard %[[R]]#1 <@stage1, [{"model"}, {}]>
  // CHECK: stablehlo.dot_general
  // CHECK-SAME: <@stage1, [{"model"}, {}]>
  func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> tensor<4096x64xf32> {
    %zero = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<0> : tensor<i32>
    %one = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<1> : tensor<i32>
    %three = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<3> : tensor<i32>
    %y0 = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4096x64xf32>
    %r:3 = stablehlo.while(%i = %zero, %h = %y0, %v = %w) : tensor<i32>, tensor<4096x64xf32>, tensor<64x64xf32> attributes {bactrian.phase = "forward", bactrian.stage = 0 : i64}
     cond {
      %c = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %c : tensor<i1>
    } do {
      %p = stablehlo.dot_general %h, %v, contracting_dims = [1] x [0] : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
      %j = stablehlo.add %i, %one : tensor<i32>
      stablehlo.return %j, %p, %v : tensor<i32>, tensor<4096x64xf32>, tensor<64x64xf32>
    }
    %z = stablehlo.dot_general %r#1, %r#2, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
    return %z : tensor<4096x64xf32>
  }
}

// -----

// One image: its rows are cut, also where a maximum is taken of each two, and the kernel is everywhere. A device sends one
// row of 512 x 8 numbers to the neighbour before it and one to that behind.
// CHECK-LABEL: module @one_image
// CHECK-SAME: sent_bytes = {collective_permute = 32768 : i64}
module @one_image {
  sdy.mesh @stage0 = <["rows"=4]>
  // CHECK: tensor<1x512x512x8xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{}, {"rows"}, {}, {}]>}
  // CHECK-SAME: tensor<3x3x8x8xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {}, {}, {}]>}
  // CHECK-NOT: sdy.reshard
  // CHECK: stablehlo.convolution
  // CHECK-SAME: <@stage0, [{}, {"rows"}, {}, {}]>
  // CHECK: "stablehlo.reduce_window"
  // CHECK: <@stage0, [{}, {"rows"}, {}, {}]>
  // CHECK-NOT: sdy.reshard
  func.func public @main(%x: tensor<1x512x512x8xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{}, {"rows"}, {}, {}]>}, %k: tensor<3x3x8x8xf32> {bactrian.role = "state"}) -> tensor<1x256x256x8xf32> {
    %low = stablehlo.constant {bactrian.phase = "forward"} dense<0xFF800000> : tensor<f32>
    %y = stablehlo.convolution(%x, %k) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {pad = [[1, 1], [1, 1]]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64, bactrian.phase = "forward"} : (tensor<1x512x512x8xf32>, tensor<3x3x8x8xf32>) -> tensor<1x512x512x8xf32>
    %z = "stablehlo.reduce_window"(%y, %low) <{window_dimensions = array<i64: 1, 2, 2, 1>, window_strides = array<i64: 1, 2, 2, 1>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %m = stablehlo.maximum %a, %b : tensor<f32>
      stablehlo.return %m : tensor<f32>
    }) {bactrian.phase = "forward"} : (tensor<1x512x512x8xf32>, tensor<f32>) -> tensor<1x256x256x8xf32>
    return %z : tensor<1x256x256x8xf32>
  }
}

// -----

// What another stage accumulates is received below the boundary: above it the value exists once per microbatch.
// CHECK-LABEL: module @received_below_the_boundary
module @received_below_the_boundary attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage0 = <["data"=2]>
  sdy.mesh @stage1 = <["data"=2]>
  func.func public @main(%w: tensor<8x8xf32> {bactrian.role = "state"},
      %x: tensor<8x8xf32> {bactrian.role = "batch"}) -> (tensor<8x8xf32> {bactrian.updates = 0 : i64}) {
    %z = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 1 : i64} dense<0.0> : tensor<8x8xf32>
    %t = stablehlo.add %w, %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8x8xf32>
    %y = stablehlo.multiply %x, %t {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<8x8xf32>
    %a = stablehlo.add %z, %y {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<8x8xf32>
    // CHECK: %[[SUM:.*]] = stablehlo.custom_call @bactrian.gradient_boundary
    // CHECK: %[[RECEIVED:.*]] = sdy.reshard %[[SUM]] <@stage0
    // CHECK: stablehlo.subtract {{.*}}%[[RECEIVED]]
    %g = stablehlo.custom_call @bactrian.gradient_boundary(%a)
        {mhlo.backend_config = {kinds = "gradient", reductions = "accumulated"}} : (tensor<8x8xf32>) -> tensor<8x8xf32>
    %n = stablehlo.subtract %w, %g {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<8x8xf32>
    return %n : tensor<8x8xf32>
  }
}

// -----

// A stage of one device beside one of four: it gets the whole value, which the other one has in shards.
// CHECK-LABEL: module @four_devices_and_one
module @four_devices_and_one attributes {bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  sdy.mesh @stage1 = <["model"=1]>
  // CHECK: %[[Y:.*]] = stablehlo.dot_general {{.*}}<@stage0, [{"data"}, {}]>
  // CHECK: %[[R:.*]] = sdy.reshard %[[Y]] <@stage1, [{}, {}]>
  // CHECK: stablehlo.dot_general %[[R]], {{.*}}<@stage1, [{}, {}]>
  func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}, %v: tensor<64x64xf32> {bactrian.role = "state"}) -> tensor<4096x64xf32> {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
    %z = stablehlo.dot_general %y, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
    return %z : tensor<4096x64xf32>
  }
}

// -----

// An argument that two stages read is given each stage's own sharding, where it is given one; then nothing is left of it.
// CHECK-LABEL: module @given_by_stage
module @given_by_stage attributes {bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage0 = <["x"=2]>
  sdy.mesh @stage1 = <["y"=2]>
  // CHECK: %[[W:[a-z0-9]+]]: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{"x"}, {}]>}
  // CHECK: sdy.reshard %[[W]] <@stage1, [{}, {"y"}]>
  // CHECK-NOT: bactrian.stage_shardings
  func.func public @main(%x: tensor<64x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state", bactrian.stage_shardings = {stage0 = #sdy.sharding<@stage0, [{"x"}, {}]>, stage1 = #sdy.sharding<@stage1, [{}, {"y"}]>}}) -> tensor<64x64xf32> {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>
    %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<64x64xf32>, tensor<64x64xf32>) -> tensor<64x64xf32>
    return %z : tensor<64x64xf32>
  }
}
