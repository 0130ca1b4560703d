// RUN: bactrian-opt %s --assign-stages=num-stages=2 | FileCheck %s
// RUN: bactrian-opt %s --assign-stages=boundaries=0,1 | FileCheck %s --check-prefix=GIVEN
// RUN: bactrian-opt %s --assign-stages | FileCheck %s --check-prefix=EACH
// RUN: bactrian-opt %s --assign-stages='num-stages=2 mesh=data=2,model=4' | FileCheck %s --check-prefix=MESH
// RUN: bactrian-opt %s --assign-stages='num-stages=2 mesh=data=2,model=4;data=8' | FileCheck %s --check-prefix=MESHES
// RUN: bactrian-opt %s --assign-stages='num-stages=2 remat=all' | FileCheck %s --check-prefix=REMAT
// RUN: bactrian-opt %s --assign-stages='num-stages=2 mesh=data=1;data=4' | FileCheck %s --check-prefix=UNEQUAL

// One word is that of all layers.
// REMAT: bactrian.remat = ["all", "all", "all"]
// Every stage has the mesh that is asked for.
// MESH: sdy.mesh @stage0 = <["data"=2, "model"=4]>
// MESH-NEXT: sdy.mesh @stage1 = <["data"=2, "model"=4]>
// MESHES: sdy.mesh @stage0 = <["data"=2, "model"=4]>
// MESHES-NEXT: sdy.mesh @stage1 = <["data"=8]>

// Layers of 1, 1 and 2 products: the largest stage is smallest with two layers first. Update ops go with their layer.
// CHECK: bactrian.num_stages = 2
// CHECK: sdy.mesh @stage0 = <["data"=1]>
// CHECK-NEXT: sdy.mesh @stage1 = <["data"=1]>
// CHECK-LABEL: func.func public @main
// CHECK: bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0
// CHECK-NEXT: bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 0
// CHECK-NEXT: bactrian.layer = 2 : i64, bactrian.phase = "forward", bactrian.stage = 1
// CHECK-NEXT: bactrian.layer = 2 : i64, bactrian.phase = "backward", bactrian.stage = 1
// CHECK-NEXT: bactrian.layer = 1 : i64, bactrian.phase = "update", bactrian.stage = 0

// A stage of four devices gets more of the layers than one of a single device.
// UNEQUAL: bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0
// UNEQUAL-NEXT: bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 1
// UNEQUAL-NEXT: bactrian.layer = 2 : i64, bactrian.phase = "forward", bactrian.stage = 1

// GIVEN: bactrian.num_stages = 2
// GIVEN: bactrian.layer = 0 : i64, bactrian.phase = "forward", bactrian.stage = 0
// GIVEN-NEXT: bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 1
// GIVEN-NEXT: bactrian.layer = 2 : i64, bactrian.phase = "forward", bactrian.stage = 1

// EACH: bactrian.num_stages = 3
// EACH: bactrian.layer = 1 : i64, bactrian.phase = "forward", bactrian.stage = 1
// EACH-NEXT: bactrian.layer = 2 : i64, bactrian.phase = "forward", bactrian.stage = 2
module attributes {bactrian.num_layers = 3 : i64} {
  func.func public @main(%x: tensor<4x4xf32> {bactrian.role = "batch"}, %s: tensor<4x4xf32> {bactrian.role = "state"}) -> (tensor<4x4xf32>, tensor<4x4xf32> {bactrian.updates = 1 : i64}) {
    %a = stablehlo.dot_general %x, %s, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    %b = stablehlo.dot_general %a, %s, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    %c = stablehlo.dot_general %b, %s, contracting_dims = [1] x [0] {bactrian.layer = 2 : i64, bactrian.phase = "forward"} : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    %d = stablehlo.dot_general %c, %s, contracting_dims = [1] x [0] {bactrian.layer = 2 : i64, bactrian.phase = "backward"} : (tensor<4x4xf32>, tensor<4x4xf32>) -> tensor<4x4xf32>
    %e = stablehlo.negate %s {bactrian.layer = 1 : i64, bactrian.phase = "update"} : tensor<4x4xf32>
    return %d, %e : tensor<4x4xf32>, tensor<4x4xf32>
  }
}
