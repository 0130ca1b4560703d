// RUN: bactrian-opt %s --group-layers=num-layers=2 --split-input-file | FileCheck %s

// Four products of equal weight: two in each layer, elementwise ops with the product that they follow.
// CHECK: bactrian.num_layers = 2
// CHECK-LABEL: func.func public @main
// CHECK: %[[A:.*]] = stablehlo.dot_general %arg0, %arg1, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[B:.*]] = stablehlo.dot_general %[[A]], %arg2, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[C:.*]] = stablehlo.tanh %[[B]] {bactrian.layer = 0
// CHECK-NEXT: %[[D:.*]] = stablehlo.dot_general %[[C]], %arg3, {{.*}}bactrian.layer = 1
// CHECK-NEXT: %[[E:.*]] = stablehlo.dot_general %[[D]], %arg4, {{.*}}bactrian.layer = 1
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.role = "constant"}, %w: tensor<16x16xf32> {bactrian.role = "constant"}, %s: tensor<16x16xf32> {bactrian.role = "constant"}, %t: tensor<16x16xf32> {bactrian.role = "constant"}) -> tensor<4x16xf32> {
  %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %b = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %c = stablehlo.tanh %b {bactrian.phase = "forward"} : tensor<4x16xf32>
  %d = stablehlo.dot_general %c, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %e = stablehlo.dot_general %d, %t, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  return %e : tensor<4x16xf32>
}

// -----

// The smaller value crosses: the cut is not after the broadcast, where the balance is the same.
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.dot_general %arg0, %arg1, {{.*}}bactrian.layer = 0
// CHECK: stablehlo.reduce{{.*}}bactrian.layer = 0
// CHECK: stablehlo.broadcast_in_dim{{.*}}bactrian.layer = 1
// CHECK: stablehlo.dot_general{{.*}}bactrian.layer = 1
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.role = "constant"}, %w: tensor<16x16xf32> {bactrian.role = "constant"}) -> tensor<4x16xf32> {
  %zero = stablehlo.constant {bactrian.phase = "forward"} dense<0.0> : tensor<f32>
  %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %b = stablehlo.reduce(%a init: %zero) applies stablehlo.add across dimensions = [1] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<f32>) -> tensor<4xf32>
  %c = stablehlo.broadcast_in_dim %b, dims = [0] {bactrian.phase = "forward"} : (tensor<4xf32>) -> tensor<4x16xf32>
  %d = stablehlo.dot_general %c, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  return %d : tensor<4x16xf32>
}

// -----

// Cuts are made at the boundary, however uneven; it is gone, in the backward phase too.
// CHECK-LABEL: func.func public @main
// CHECK-NOT: stage_boundary
// CHECK: stablehlo.dot_general %arg0, %arg1, {{.*}}bactrian.layer = 0
// CHECK: stablehlo.dot_general{{.*}}bactrian.layer = 0
// CHECK: stablehlo.dot_general{{.*}}bactrian.layer = 0
// CHECK: stablehlo.dot_general{{.*}}bactrian.layer = 1
// CHECK-NOT: stage_boundary
// CHECK: return
func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.role = "constant"}) -> tensor<4x16xf32> {
  %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %b = stablehlo.dot_general %a, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %c = stablehlo.dot_general %b, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %m = stablehlo.custom_call @bactrian.stage_boundary(%c) {bactrian.phase = "forward"} : (tensor<4x16xf32>) -> tensor<4x16xf32>
  %d = stablehlo.dot_general %m, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
  %g = stablehlo.negate %d {bactrian.phase = "backward"} : tensor<4x16xf32>
  %n = stablehlo.custom_call @bactrian.stage_boundary(%g) {bactrian.phase = "backward"} : (tensor<4x16xf32>) -> tensor<4x16xf32>
  return %n : tensor<4x16xf32>
}

// -----

// Backward ops go to the residual and the parameter that they read, update ops to their parameter; the optimizer's
// state comes along. A constant goes to its lowest reader, in the backward phase to its highest.
// CHECK-LABEL: func.func public @main
// CHECK-DAG: stablehlo.constant {bactrian.layer = 0 : i64, bactrian.phase = "update"}
// CHECK-DAG: stablehlo.constant {bactrian.layer = 1 : i64, bactrian.phase = "backward"}
// CHECK: %[[Y:.*]] = stablehlo.dot_general %arg4, %arg0, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[Z:.*]] = stablehlo.dot_general %[[Y]], %arg1, {{.*}}bactrian.layer = 1
// CHECK-NEXT: %[[DZ:.*]] = stablehlo.multiply %[[Z]], {{.*}} {bactrian.layer = 1
// CHECK-NEXT: %[[DW:.*]] = stablehlo.dot_general %[[Y]], %[[DZ]], {{.*}}bactrian.layer = 1
// CHECK-NEXT: %[[DY:.*]] = stablehlo.dot_general %[[DZ]], %arg1, {{.*}}bactrian.layer = 1
// CHECK-NEXT: %[[DYS:.*]] = stablehlo.multiply %[[DY]], {{.*}} {bactrian.layer = 0
// CHECK-NEXT: %[[DV:.*]] = stablehlo.dot_general %arg4, %[[DYS]], {{.*}}bactrian.layer = 0
// CHECK: %[[MV:.*]] = stablehlo.add %arg2, {{.*}} {bactrian.layer = 0
// CHECK-NEXT: %[[MW:.*]] = stablehlo.add %arg3, {{.*}} {bactrian.layer = 1
// CHECK-NEXT: stablehlo.multiply %[[MV]], {{.*}} {bactrian.layer = 0
// CHECK-NEXT: stablehlo.multiply %[[MW]], {{.*}} {bactrian.layer = 1
func.func public @main(%v: tensor<16x16xf32> {bactrian.role = "state"}, %w: tensor<16x16xf32> {bactrian.role = "state"}, %mv: tensor<16x16xf32> {bactrian.role = "state"}, %mw: tensor<16x16xf32> {bactrian.role = "state"}, %x: tensor<64x16xf32> {bactrian.role = "batch"})
    -> (tensor<16x16xf32> {bactrian.updates = 0 : i64}, tensor<16x16xf32> {bactrian.updates = 1 : i64}, tensor<16x16xf32> {bactrian.updates = 2 : i64}, tensor<16x16xf32> {bactrian.updates = 3 : i64}) {
  %rate = stablehlo.constant {bactrian.phase = "update"} dense<0.1> : tensor<16x16xf32>
  %two = stablehlo.constant {bactrian.phase = "backward"} dense<2.0> : tensor<64x16xf32>
  %y = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<64x16xf32>, tensor<16x16xf32>) -> tensor<64x16xf32>
  %z = stablehlo.dot_general %y, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<64x16xf32>, tensor<16x16xf32>) -> tensor<64x16xf32>
  %dz = stablehlo.multiply %z, %two {bactrian.phase = "backward"} : tensor<64x16xf32>
  %dw = stablehlo.dot_general %y, %dz, contracting_dims = [0] x [0] {bactrian.phase = "backward"} : (tensor<64x16xf32>, tensor<64x16xf32>) -> tensor<16x16xf32>
  %dy = stablehlo.dot_general %dz, %w, contracting_dims = [1] x [1] {bactrian.phase = "backward"} : (tensor<64x16xf32>, tensor<16x16xf32>) -> tensor<64x16xf32>
  %dys = stablehlo.multiply %dy, %two {bactrian.phase = "backward"} : tensor<64x16xf32>
  %dv = stablehlo.dot_general %x, %dys, contracting_dims = [0] x [0] {bactrian.phase = "backward"} : (tensor<64x16xf32>, tensor<64x16xf32>) -> tensor<16x16xf32>
  %g:2 = stablehlo.custom_call @bactrian.gradient_boundary(%dv, %dw) {mhlo.backend_config = {kinds = "gradient,gradient", reductions = "mean,mean"}} : (tensor<16x16xf32>, tensor<16x16xf32>) -> (tensor<16x16xf32>, tensor<16x16xf32>)
  %nmv = stablehlo.add %mv, %g#0 {bactrian.phase = "update"} : tensor<16x16xf32>
  %nmw = stablehlo.add %mw, %g#1 {bactrian.phase = "update"} : tensor<16x16xf32>
  %sv = stablehlo.multiply %nmv, %rate {bactrian.phase = "update"} : tensor<16x16xf32>
  %sw = stablehlo.multiply %nmw, %rate {bactrian.phase = "update"} : tensor<16x16xf32>
  %nv = stablehlo.subtract %v, %sv {bactrian.phase = "update"} : tensor<16x16xf32>
  %nw = stablehlo.subtract %w, %sw {bactrian.phase = "update"} : tensor<16x16xf32>
  return %nv, %nw, %nmv, %nmw : tensor<16x16xf32>, tensor<16x16xf32>, tensor<16x16xf32>, tensor<16x16xf32>
}

// -----

// Another program has placed the arguments: three products are on the first stage, although two would be balanced, and
// an argument on both stages is read on either. The update goes to its state's home.
// CHECK-LABEL: module attributes
// CHECK-SAME: bactrian.num_layers = 2
// CHECK: %[[A:.*]] = stablehlo.dot_general %arg0, %arg1, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[B:.*]] = stablehlo.dot_general %[[A]], %arg2, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[C:.*]] = stablehlo.dot_general %[[B]], %arg3, {{.*}}bactrian.layer = 0
// CHECK-NEXT: %[[D:.*]] = stablehlo.dot_general %[[C]], %arg2, {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.dot_general %[[D]], %arg4, {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.add %arg5, %arg5 {bactrian.layer = 1 : i64, bactrian.phase = "update"}
module attributes {bactrian.num_stages = 2 : i64} {
  func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.pinned_stages = [0], bactrian.role = "constant"}, %w: tensor<16x16xf32> {bactrian.pinned_stages = [0, 1], bactrian.role = "constant"}, %s: tensor<16x16xf32> {bactrian.pinned_stages = [0], bactrian.role = "constant"}, %t: tensor<16x16xf32> {bactrian.pinned_stages = [1], bactrian.role = "constant"}, %m: tensor<16x16xf32> {bactrian.pinned_stages = [1], bactrian.role = "state"}) -> (tensor<4x16xf32>, tensor<16x16xf32> {bactrian.updates = 5 : i64}) {
    %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %b = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %c = stablehlo.dot_general %b, %s, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %d = stablehlo.dot_general %c, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %e = stablehlo.dot_general %d, %t, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    %n = stablehlo.add %m, %m {bactrian.phase = "update"} : tensor<16x16xf32>
    return %e, %n : tensor<4x16xf32>, tensor<16x16xf32>
  }
}

// -----

// Both halves compute their mask of the positions again; forward there is one for both. It forbids no cut between them,
// and is not counted: each stage will make its own.
// CHECK-LABEL: module @mask_of_the_batch
// CHECK: stablehlo.compare {{.*}}bactrian.layer = 0
// CHECK: stablehlo.dot_general %arg1, %arg2, {{.*}}bactrian.layer = 0
// CHECK-NEXT: stablehlo.select {{.*}}bactrian.layer = 0
// CHECK-NEXT: stablehlo.dot_general {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.select {{.*}}bactrian.layer = 1
// CHECK-NEXT: stablehlo.dot_general {{.*}}bactrian.layer = 1
module @mask_of_the_batch {
  func.func public @main(%p: tensor<16xi32> {bactrian.role = "batch"}, %x: tensor<16x16xf32> {bactrian.role = "batch"}, %v: tensor<16x16xf32> {bactrian.role = "state"}, %w: tensor<16x16xf32> {bactrian.role = "state"}, %h: tensor<16x1xf32> {bactrian.role = "state"}) -> (tensor<16x1xf32>, tensor<16x16xf32>, tensor<16x16xf32>) {
    %r = stablehlo.broadcast_in_dim %p, dims = [0] {bactrian.phase = "forward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %c = stablehlo.broadcast_in_dim %p, dims = [1] {bactrian.phase = "forward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %m = stablehlo.compare GE, %r, %c {bactrian.phase = "forward"} : (tensor<16x16xi32>, tensor<16x16xi32>) -> tensor<16x16xi1>
    %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<16x16xf32>, tensor<16x16xf32>) -> tensor<16x16xf32>
    %am = stablehlo.select %m, %a, %x {bactrian.phase = "forward"} : tensor<16x16xi1>, tensor<16x16xf32>
    %b = stablehlo.dot_general %am, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<16x16xf32>, tensor<16x16xf32>) -> tensor<16x16xf32>
    %bm = stablehlo.select %m, %b, %am {bactrian.phase = "forward"} : tensor<16x16xi1>, tensor<16x16xf32>
    %o = stablehlo.dot_general %bm, %h, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<16x16xf32>, tensor<16x1xf32>) -> tensor<16x1xf32>
    %k:2 = stablehlo.optimization_barrier {bactrian.phase = "backward"} %p, %am : tensor<16xi32>, tensor<16x16xf32>
    %kr = stablehlo.broadcast_in_dim %k#0, dims = [0] {bactrian.phase = "backward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %kc = stablehlo.broadcast_in_dim %k#0, dims = [1] {bactrian.phase = "backward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %km = stablehlo.compare GE, %kr, %kc {bactrian.phase = "backward"} : (tensor<16x16xi32>, tensor<16x16xi32>) -> tensor<16x16xi1>
    %dw = stablehlo.select %km, %k#1, %bm {bactrian.phase = "backward"} : tensor<16x16xi1>, tensor<16x16xf32>
    %l:2 = stablehlo.optimization_barrier {bactrian.phase = "backward"} %p, %x : tensor<16xi32>, tensor<16x16xf32>
    %lr = stablehlo.broadcast_in_dim %l#0, dims = [0] {bactrian.phase = "backward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %lc = stablehlo.broadcast_in_dim %l#0, dims = [1] {bactrian.phase = "backward"} : (tensor<16xi32>) -> tensor<16x16xi32>
    %lm = stablehlo.compare GE, %lr, %lc {bactrian.phase = "backward"} : (tensor<16x16xi32>, tensor<16x16xi32>) -> tensor<16x16xi1>
    %dv = stablehlo.select %lm, %l#1, %dw {bactrian.phase = "backward"} : tensor<16x16xi1>, tensor<16x16xf32>
    %e:3 = stablehlo.custom_call @bactrian.gradient_boundary(%o, %dv, %dw) {mhlo.backend_config = {kinds = "aux,gradient,gradient", reductions = "last,mean,mean"}} : (tensor<16x1xf32>, tensor<16x16xf32>, tensor<16x16xf32>) -> (tensor<16x1xf32>, tensor<16x16xf32>, tensor<16x16xf32>)
    return %e#0, %e#1, %e#2 : tensor<16x1xf32>, tensor<16x16xf32>, tensor<16x16xf32>
  }
}

// -----

// With less work than stages, ops are where their arguments are; the last stage has none.
// CHECK: module attributes {bactrian.num_layers = 2 : i64, bactrian.num_stages = 2 : i64}
module attributes {bactrian.num_stages = 2 : i64} {
  func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %w: tensor<16x16xf32> {bactrian.pinned_stages = [0], bactrian.role = "constant"}) -> tensor<4x16xf32> {
    // CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 0
    %b = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    // CHECK: stablehlo.sine {{.*}}bactrian.layer = 0
    %c = stablehlo.sine %b {bactrian.phase = "forward"} : tensor<4x16xf32>
    return %c : tensor<4x16xf32>
  }
}

// -----

// Two products, both with arguments of the last stage: the first has none.
// CHECK: module attributes {bactrian.num_layers = 2 : i64, bactrian.num_stages = 2 : i64}
module attributes {bactrian.num_stages = 2 : i64} {
  func.func public @main(%x: tensor<4x16xf32> {bactrian.role = "batch"}, %w: tensor<16x16xf32> {bactrian.pinned_stages = [1], bactrian.role = "constant"}) -> tensor<4x16xf32> {
    // CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 1
    %b = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    // CHECK: stablehlo.dot_general {{.*}}bactrian.layer = 1
    %c = stablehlo.dot_general %b, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward"} : (tensor<4x16xf32>, tensor<16x16xf32>) -> tensor<4x16xf32>
    return %c : tensor<4x16xf32>
  }
}
