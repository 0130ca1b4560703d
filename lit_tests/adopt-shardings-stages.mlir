// RUN: bactrian-opt --pass-pipeline='builtin.module(adopt-shardings{mesh=data=2,model=4;data=2,expert=2})' %s | FileCheck %s
// RUN: not bactrian-opt --pass-pipeline='builtin.module(adopt-shardings{mesh=data=2,model=4;data=4,expert=2})' %s 2>&1 | FileCheck %s --check-prefix=SIZES

// Stages with meshes of their own: @user has the axes of all of them.
// CHECK: sdy.mesh @user = <["data"=2, "model"=4, "expert"=2]>
// CHECK-NOT: sdy.mesh
// CHECK-LABEL: func.func public @main
// CHECK-SAME: sdy.sharding = #sdy.sharding<@user, [{"data", "model"}, {"expert"}]>

// An axis of two sizes cannot be named.
// SIZES: the sharding of an argument is over a mesh data=2,model=4,expert=2, but stages have the meshes data=2,model=4; data=4,expert=2
// SIZES: why: axis data has size 2 there, and 4 in a stage's mesh
sdy.mesh @users = <["data"=2, "model"=4, "expert"=2]>
func.func public @main(%arg0: tensor<8x8xf32> {sdy.sharding = #sdy.sharding<@users, [{"data", "model"}, {"expert"}]>}) -> tensor<8x8xf32> {
  %0 = stablehlo.negate %arg0 : tensor<8x8xf32>
  return %0 : tensor<8x8xf32>
}
