// RUN: bactrian-opt %s --choose-pipeline | FileCheck %s
// RUN: bactrian-opt %s --choose-pipeline=num-stages=1 | FileCheck %s --check-prefix=ONE
// RUN: bactrian-opt %s --choose-pipeline='boundaries=0,1 schedule=gpipe' | FileCheck %s --check-prefix=GIVEN
// RUN: bactrian-opt %s --choose-pipeline='measured="0-2 on data=1 of 8 takes inf inf; 0-1 on data=1 of 8 takes 9.0 1.0; 0-3 on data=1 of 8 takes 1.0 1.0"' | FileCheck %s --check-prefix=MEASURED
// RUN: bactrian-opt %s --choose-pipeline --assign-stages | FileCheck %s --check-prefix=ASSIGNED

// Three equal layers on a device each: 8 microbatches take 10 periods of one layer, with fewer stages 16 or 24.
// CHECK: bactrian.first_devices = array<i64: 0, 1, 2>
// CHECK-SAME: bactrian.first_layers = array<i64: 0, 1, 2>
// CHECK-SAME: bactrian.schedule = "eager-1f1b"
// CHECK: sdy.mesh @stage0 = <["data"=1]>
// CHECK-NEXT: sdy.mesh @stage1 = <["data"=1]>
// CHECK-NEXT: sdy.mesh @stage2 = <["data"=1]>
// CHECK-NOT: bactrian.stage =

// What is given is kept.
// ONE: bactrian.first_layers = array<i64: 0>
// ONE: sdy.mesh @stage0 = <["data"=1]>
// ONE-NOT: sdy.mesh @stage1
// GIVEN: bactrian.first_layers = array<i64: 0, 1>
// GIVEN-SAME: bactrian.schedule = "gpipe"

// A stage of two layers can't run, and those of one layer are slow.
// MEASURED: bactrian.first_layers = array<i64: 0>

// The next pass carries it out.
// ASSIGNED: bactrian.num_stages = 3
// ASSIGNED: bactrian.layer = 2 : i64, bactrian.phase = "forward", bactrian.stage = 2
module attributes {bactrian.num_layers = 3 : i64, bactrian.num_microbatches = 8 : i64} {
  func.func public @main(%u: tensor<1024x1024xf32> {bactrian.role = "state"}, %v: tensor<1024x1024xf32> {bactrian.role = "state"}, %w: tensor<1024x1024xf32> {bactrian.role = "state"}, %x: tensor<512x1024xf32> {bactrian.role = "batch"}) -> tensor<512x1024xf32> {
    %a = stablehlo.dot_general %x, %u, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
    %b = stablehlo.dot_general %a, %v, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
    %c = stablehlo.dot_general %b, %w, contracting_dims = [1] x [0] {bactrian.layer = 2 : i64, bactrian.phase = "forward"} : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
    %s = stablehlo.custom_call @bactrian.gradient_boundary(%c) {mhlo.backend_config = {kinds = "output", reductions = "sum"}} : (tensor<512x1024xf32>) -> tensor<512x1024xf32>
    return %s : tensor<512x1024xf32>
  }
}
