// RUN: bactrian-opt %s --group-layers='most-layers=8' | FileCheck %s
// RUN: bactrian-opt %s --group-layers='most-layers=2' | FileCheck %s --check-prefix=TWO

// A block of two products three times, then another product: each is a layer, cut where the least crosses.
// Of blocks there are two in a layer, if there may be no more than two layers of them.
// CHECK: bactrian.num_layers = 4
// TWO: bactrian.num_layers = 3
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 0
// CHECK-NEXT: stablehlo.tanh {{.*}}bactrian.layer = 0
// CHECK-NEXT: stablehlo.dot_general {{.*}}bactrian.layer = 0
// CHECK-NEXT: stablehlo.add {{.*}}bactrian.layer = 0
// CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.tanh {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.dot_general {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.add {{.*}}bactrian.layer = 1
// CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 2
// CHECK-NEXT: stablehlo.tanh {{.*}}bactrian.layer = 2
// CHECK-NEXT: stablehlo.dot_general {{.*}}bactrian.layer = 2
// CHECK-NEXT: stablehlo.add {{.*}}bactrian.layer = 2
// CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 3
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x64xf32> {bactrian.role = "state"}, %w: tensor<64x16xf32> {bactrian.role = "state"}, %h: tensor<16x64xf32> {bactrian.role = "state"}) -> tensor<4x64xf32> {
  %a0 = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x64xf32>) -> tensor<4x64xf32>
  %b0 = stablehlo.tanh %a0 {bactrian.phase = "forward"} : tensor<4x64xf32>
  %c0 = stablehlo.dot_general %b0, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x16xf32>) -> tensor<4x16xf32>
  %x1 = stablehlo.add %x, %c0 {bactrian.phase = "forward"} : tensor<4x16xf32>
  %a1 = stablehlo.dot_general %x1, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x64xf32>) -> tensor<4x64xf32>
  %b1 = stablehlo.tanh %a1 {bactrian.phase = "forward"} : tensor<4x64xf32>
  %c1 = stablehlo.dot_general %b1, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x16xf32>) -> tensor<4x16xf32>
  %x2 = stablehlo.add %x1, %c1 {bactrian.phase = "forward"} : tensor<4x16xf32>
  %a2 = stablehlo.dot_general %x2, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x64xf32>) -> tensor<4x64xf32>
  %b2 = stablehlo.tanh %a2 {bactrian.phase = "forward"} : tensor<4x64xf32>
  %c2 = stablehlo.dot_general %b2, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x16xf32>) -> tensor<4x16xf32>
  %x3 = stablehlo.add %x2, %c2 {bactrian.phase = "forward"} : tensor<4x16xf32>
  %y = stablehlo.dot_general %x3, %h, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x64xf32>) -> tensor<4x64xf32>
  return %y : tensor<4x64xf32>
}
