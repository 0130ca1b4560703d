// RUN: bactrian-opt %s --pass-pipeline='builtin.module(func.func(sdy-populate-op-sharding-rules),solve-shardings{time-limit=30})' | FileCheck %s

// What was asked for over @user is read on the mesh of each stage, by the names of axes: stage 1 has no axis "model". What
// no op reads is over the first stage's mesh. A constraint in a branch is over the mesh of its stage.
// CHECK-NOT: @user
// CHECK: sdy.mesh @stage0 = <["data"=2, "model"=2]>
// CHECK-NEXT: sdy.mesh @stage1 = <["data"=4]>
// CHECK-LABEL: func.func public @main
// CHECK-SAME: %arg0: tensor<8x16xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}
// CHECK-SAME: %arg1: tensor<16x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {"model"}]>}
// CHECK-SAME: %arg2: tensor<16x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage1, [{"data"}, {}]>}
// CHECK-SAME: %arg3: tensor<2x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {"model"}]>}
// CHECK: sdy.sharding_constraint {{.*}} <@stage1, [{?}, {}]>
// CHECK-NOT: @user
module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 2 : i64} {
  sdy.mesh @user = <["data"=2, "model"=2]>
  sdy.mesh @stage0 = <["data"=2, "model"=2]>
  sdy.mesh @stage1 = <["data"=4]>
  func.func public @main(%x: tensor<8x16xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@user, [{"data"}, {}]>}, %v: tensor<16x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@user, [{}, {"model"}]>}, %w: tensor<16x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@user, [{"data"}, {"model"}]>}, %u: tensor<2x16xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@user, [{"data"}, {"model"}]>}) -> (tensor<8x16xf32>, tensor<2x16xf32> {bactrian.updates = 3 : i64}) {
    %i = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 1 : i64} dense<0> : tensor<i32>
    %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (tensor<8x16xf32>, tensor<16x16xf32>) -> tensor<8x16xf32>
    %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<8x16xf32>, tensor<16x16xf32>) -> tensor<8x16xf32>
    %r = "stablehlo.case"(%i) ({
      %c = sdy.sharding_constraint %z <@user, [{?}, {"model"}]> : tensor<8x16xf32>
      stablehlo.return %c : tensor<8x16xf32>
    }) {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<i32>) -> tensor<8x16xf32>
    return %r, %u : tensor<8x16xf32>, tensor<2x16xf32>
  }
}
