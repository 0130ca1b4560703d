// RUN: bactrian-opt --adopt-shardings --split-input-file %s | FileCheck %s
// RUN: bactrian-opt --pass-pipeline='builtin.module(adopt-shardings{mesh=model=4,data=2})' --split-input-file %s | FileCheck %s --check-prefix=ORDER

// An argument that is read through one constraint has its sharding; axes of one device are left out, the mesh goes.
// CHECK-NOT: @users
// CHECK-LABEL: func.func public @main
// CHECK-SAME: sdy.sharding = #sdy.sharding<@user, [{"model"}, {"data"}]>
// CHECK-NEXT: stablehlo.negate %arg0
// ORDER: sdy.mesh @user = <["model"=4, "data"=2]>
// ORDER: sdy.sharding = #sdy.sharding<@user, [{"model"}, {"data"}]>
sdy.mesh @users = <["model"=4, "replica"=1, "data"=2]>
sdy.mesh @stage0 = <["model"=4, "data"=2]>
func.func public @main(%arg0: tensor<8x8xf32>) -> tensor<8x8xf32> {
  %0 = sdy.sharding_constraint %arg0 <@users, [{"model"}, {"replica", "data"}]> : tensor<8x8xf32>
  %1 = sdy.sharding_constraint %0 <@users, [{"model"}, {"data"}]> : tensor<8x8xf32>
  %2 = stablehlo.negate %1 : tensor<8x8xf32>
  return %2 : tensor<8x8xf32>
}

// -----

// A mesh with some of the axes is enough. What is read in two ways keeps its constraints, and so do open dims.
// CHECK-LABEL: func.func public @main
// CHECK-NOT: sdy.sharding =
// CHECK: [[A:%.*]] = sdy.sharding_constraint %arg0 <@user, [{"data"}, {?}]>
// CHECK-NEXT: stablehlo.add [[A]], %arg0
// CHECK-NEXT: sdy.sharding_constraint {{.*}} <@user, [{"data"}, {}]>
// CHECK-NEXT: return
// ORDER: func.func
sdy.mesh @users = <["data"=2]>
sdy.mesh @stage0 = <["model"=4, "data"=2]>
func.func public @main(%arg0: tensor<8x8xf32>) -> tensor<8x8xf32> {
  %0 = sdy.sharding_constraint %arg0 <@users, [{"data"}, {?}]> : tensor<8x8xf32>
  %1 = stablehlo.add %0, %arg0 : tensor<8x8xf32>
  %2 = sdy.sharding_constraint %1 <@users, [{?}, {?}]> : tensor<8x8xf32>
  %3 = sdy.sharding_constraint %2 <@users, [{"data"}, {}]> : tensor<8x8xf32>
  return %3 : tensor<8x8xf32>
}

// -----

// State has the sharding in which its next value is asked for.
// CHECK-LABEL: func.func public @main
// CHECK-SAME: %arg0: tensor<8xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@user, [{"data"}]>}
// CHECK-SAME: bactrian.updates = 0
// CHECK: sdy.sharding_constraint {{.*}} <@user, [{"data"}]>
// ORDER: func.func
sdy.mesh @users = <["data"=2]>
sdy.mesh @stage0 = <["model"=4, "data"=2]>
func.func public @main(%arg0: tensor<8xf32> {bactrian.role = "state"}) -> (tensor<8xf32> {bactrian.updates = 0 : i64, sdy.sharding = #sdy.sharding<@users, [{"data"}]>}) {
  %0 = stablehlo.negate %arg0 : tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

// Constraints inside of a loop are renamed, too.
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.while
// CHECK: sdy.sharding_constraint {{.*}} <@user, [{"model"}]>
// ORDER: func.func
sdy.mesh @users = <["model"=4]>
sdy.mesh @stage0 = <["model"=4, "data"=2]>
func.func public @main(%arg0: tensor<8xf32>, %arg1: tensor<i1>) -> tensor<8xf32> {
  %0:2 = stablehlo.while(%x = %arg0, %more = %arg1) : tensor<8xf32>, tensor<i1>
    cond {
      stablehlo.return %more : tensor<i1>
    } do {
      %1 = sdy.sharding_constraint %x <@users, [{"model"}]> : tensor<8xf32>
      stablehlo.return %1, %more : tensor<8xf32>, tensor<i1>
    }
  return %0#0 : tensor<8xf32>
}

// -----

// Stages of one device: nothing is left of it.
// CHECK-LABEL: func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32>
// CHECK-NEXT: return %arg0
// ORDER: func.func
sdy.mesh @users = <["model"=4]>
func.func public @main(%arg0: tensor<8xf32> {sdy.sharding = #sdy.sharding<@users, [{"model"}]>}) -> tensor<8xf32> {
  %0 = sdy.sharding_constraint %arg0 <@users, [{}]> : tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

// An axis of one device shards nothing, also where the stages' axis of that name has two.
// CHECK-LABEL: func.func public @main
// CHECK-SAME: sdy.sharding = #sdy.sharding<@user, [{}, {"model"}]>
// ORDER: sdy.sharding = #sdy.sharding<@user, [{}, {"model"}]>
sdy.mesh @users = <["data"=1, "model"=4]>
sdy.mesh @stage0 = <["model"=4, "data"=2]>
func.func public @main(%arg0: tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@users, [{"data"}, {"model"}]>})
    -> tensor<8x8xf32> {
  %0 = stablehlo.negate %arg0 : tensor<8x8xf32>
  return %0 : tensor<8x8xf32>
}
