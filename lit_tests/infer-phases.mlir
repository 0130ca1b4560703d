// RUN: bactrian-opt %s --infer-phases --split-input-file | FileCheck %s

// The loss and aux values are forward; what only gradients need is backward; the rest is update.
// CHECK-LABEL: module @each_op_gets_its_phase
module @each_op_gets_its_phase {
  // CHECK: func.func public @main(%[[W:.*]]: tensor<4xf32> {{.*}}, %[[X:.*]]: tensor<4xf32>
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32>, tensor<4xf32>) {
    // CHECK-NEXT: %[[LOSS:.*]] = stablehlo.multiply %[[W]], %[[X]] {bactrian.phase = "forward"}
    %loss = stablehlo.multiply %w, %x : tensor<4xf32>
    // CHECK-NEXT: %[[AUX:.*]] = stablehlo.sine %[[LOSS]] {bactrian.phase = "forward"}
    %aux = stablehlo.sine %loss : tensor<4xf32>
    // CHECK-NEXT: %[[G:.*]] = stablehlo.cosine %[[LOSS]] {bactrian.phase = "backward"}
    %g = stablehlo.cosine %loss : tensor<4xf32>
    // CHECK-NEXT: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary(%[[LOSS]], %[[AUX]], %[[G]])
    %b:3 = stablehlo.custom_call @bactrian.gradient_boundary(%loss, %aux, %g) {mhlo.backend_config =
      {kinds = "loss,aux,gradient", reductions = "mean,last,mean"}}
      : (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>, tensor<4xf32>)
    // CHECK-NEXT: %[[NEW:.*]] = stablehlo.subtract %[[W]], %[[B]]#2 {bactrian.phase = "update"}
    %new = stablehlo.subtract %w, %b#2 : tensor<4xf32>
    // CHECK-NEXT: return %[[NEW]], %[[B]]#0, %[[B]]#1
    return %new, %b#0, %b#1 : tensor<4xf32>, tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// CHECK-LABEL: module @dead_ops_are_dropped
module @dead_ops_are_dropped {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // CHECK-NOT: stablehlo.sine
    %dead = stablehlo.sine %x : tensor<4xf32>
    %dead2 = stablehlo.sine %dead : tensor<4xf32>
    // CHECK: %[[Y:.*]] = stablehlo.cosine
    %y = stablehlo.cosine %x : tensor<4xf32>
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[Y]])
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<4xf32>) -> tensor<4xf32>
    %dead3 = stablehlo.sine %b : tensor<4xf32>
    // CHECK-NEXT: return %[[B]]
    return %b : tensor<4xf32>
  }
}

// -----

// A frozen parameter: nothing reads its gradient, so that it is not computed.
// CHECK-LABEL: module @unused_gradient_is_dropped
module @unused_gradient_is_dropped {
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32>) {
    // CHECK: %[[LOSS:.*]] = stablehlo.multiply
    %loss = stablehlo.multiply %w, %x : tensor<4xf32>
    // CHECK-NOT: stablehlo.cosine
    %g = stablehlo.cosine %loss : tensor<4xf32>
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[LOSS]])
    // CHECK-SAME: kinds = "loss", reductions = "mean"
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%g, %loss) {mhlo.backend_config =
      {kinds = "gradient,loss", reductions = "sum,mean"}}
      : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
    %dead = stablehlo.sine %b#0 : tensor<4xf32>
    // CHECK-NEXT: return %{{.*}}, %[[B]]
    return %w, %b#1 : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// A cast parameter that both sides read: the update's own copy stands below the boundary.
// CHECK-LABEL: module @what_both_sides_read_is_cloned
module @what_both_sides_read_is_cloned {
  // CHECK: func.func public @main(%[[W:.*]]: tensor<4xf32> {{.*}}, %[[X:.*]]: tensor<4xf32>
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    // CHECK-NEXT: %[[T:.*]] = stablehlo.tanh %[[W]] {bactrian.phase = "backward"}
    %t = stablehlo.tanh %w : tensor<4xf32>
    // CHECK-NEXT: %[[G:.*]] = stablehlo.multiply %[[T]], %[[X]] {bactrian.phase = "backward"}
    %g = stablehlo.multiply %t, %x : tensor<4xf32>
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[G]])
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "mean"}} : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: %[[CLONE:.*]] = stablehlo.tanh %[[W]] {bactrian.phase = "update"}
    // CHECK-NEXT: %[[NEW:.*]] = stablehlo.subtract %[[CLONE]], %[[B]] {bactrian.phase = "update"}
    %new = stablehlo.subtract %t, %b : tensor<4xf32>
    // CHECK-NEXT: return %[[NEW]]
    return %new : tensor<4xf32>
  }
}

// -----

// An op of the update that stands above the boundary moves below it.
// CHECK-LABEL: module @update_stands_below_the_boundary
module @update_stands_below_the_boundary {
  // CHECK: func.func public @main(%[[STEP:.*]]: tensor<f32> {{.*}}, %[[X:.*]]: tensor<f32>
  func.func public @main(%step: tensor<f32> {bactrian.role = "state"}, %x: tensor<f32> {bactrian.role = "batch"})
      -> (tensor<f32> {bactrian.updates = 0 : i64}, tensor<f32>) {
    %next = stablehlo.cosine %step : tensor<f32>
    // CHECK-NEXT: %[[L:.*]] = stablehlo.sine %[[X]] {bactrian.phase = "forward"}
    %l = stablehlo.sine %x : tensor<f32>
    // CHECK-NEXT: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary(%[[L]])
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%l) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    // CHECK-NEXT: %[[NEXT:.*]] = stablehlo.cosine %[[STEP]] {bactrian.phase = "update"}
    // CHECK-NEXT: return %[[NEXT]], %[[B]]
    return %next, %b : tensor<f32>, tensor<f32>
  }
}

// -----

// What a branch captures counts as read, and the clone's branches read clones.
// CHECK-LABEL: module @captured_values_are_followed
module @captured_values_are_followed {
  // CHECK: func.func public @main(%[[W:.*]]: tensor<f32> {{.*}}, %[[I:.*]]: tensor<i32>
  func.func public @main(%w: tensor<f32> {bactrian.role = "state"}, %i: tensor<i32> {bactrian.role = "constant"})
      -> (tensor<f32> {bactrian.updates = 0 : i64}) {
    %t = stablehlo.tanh %w : tensor<f32>
    %c = "stablehlo.case"(%i) ({
      stablehlo.return %t : tensor<f32>
    }) : (tensor<i32>) -> tensor<f32>
    // CHECK: %[[B:.*]] = stablehlo.custom_call @bactrian.gradient_boundary
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%c) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    // CHECK-NEXT: %[[T:.*]] = stablehlo.tanh %[[W]] {bactrian.phase = "update"}
    // CHECK-NEXT: %[[C:.*]] = "stablehlo.case"(%[[I]])
    // CHECK-NEXT: stablehlo.return %[[T]]
    // CHECK: %[[N:.*]] = stablehlo.add %[[C]], %[[B]] {bactrian.phase = "update"}
    %n = stablehlo.add %c, %b : tensor<f32>
    // CHECK-NEXT: return %[[N]]
    return %n : tensor<f32>
  }
}

// -----

// CHECK-LABEL: module @microbatch_index_leaves_branches
module @microbatch_index_leaves_branches {
  func.func public @main(%i: tensor<i32> {bactrian.role = "batch"}) -> tensor<i32> {
    // CHECK: %[[M:.*]] = stablehlo.custom_call @bactrian.microbatch_index() {bactrian.phase = "forward"}
    // CHECK-NEXT: "stablehlo.case"
    // CHECK-NEXT: stablehlo.return %[[M]]
    %c = "stablehlo.case"(%i) ({
      %m = stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<i32>
      stablehlo.return %m : tensor<i32>
    }) : (tensor<i32>) -> tensor<i32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%c) {mhlo.backend_config =
      {kinds = "aux", reductions = "last"}} : (tensor<i32>) -> tensor<i32>
    return %b : tensor<i32>
  }
}

// -----

// What the loss depends on stays forward, also when nothing reads the loss itself.
// CHECK-LABEL: module @forward_without_a_loss
module @forward_without_a_loss {
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    // CHECK: stablehlo.multiply {{.*}} {bactrian.phase = "forward"}
    %y = stablehlo.multiply %w, %x : tensor<4xf32>
    // CHECK-NOT: stablehlo.sine
    %loss = stablehlo.sine %y : tensor<4xf32>
    // CHECK-NEXT: stablehlo.cosine {{.*}} {bactrian.phase = "backward"}
    %g = stablehlo.cosine %y : tensor<4xf32>
    // CHECK-NEXT: stablehlo.custom_call @bactrian.gradient_boundary(%{{[0-9]+}}) {{.*}}kinds = "gradient"
    %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%loss, %g) {mhlo.backend_config =
      {kinds = "loss,gradient", reductions = "mean,mean"}}
      : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
    return %b#1 : tensor<4xf32>
  }
}

// -----

// With one microbatch, what the update reads of the batch goes through the boundary; what it is computed by is forward.
// CHECK-LABEL: module @one_microbatch
module @one_microbatch attributes {bactrian.num_microbatches = 1 : i64} {
  // CHECK: func.func public @main(%[[W:.*]]: tensor<f32> {{.*}}, %[[X:.*]]: tensor<f32> {{.*}})
  func.func public @main(%w: tensor<f32> {bactrian.role = "state"}, %x: tensor<f32> {bactrian.role = "batch"})
      -> (tensor<f32> {bactrian.updates = 0 : i64}, tensor<f32>, tensor<f32>) {
    // CHECK: %[[G:.*]] = stablehlo.sine %[[X]] {bactrian.phase = "backward"}
    %g = stablehlo.sine %x : tensor<f32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
      {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    %n = stablehlo.subtract %w, %b : tensor<f32>
    // CHECK: %[[C:.*]] = stablehlo.cosine %[[X]] {bactrian.phase = "forward"}
    %c = stablehlo.cosine %x : tensor<f32>
    // CHECK: %[[B:.*]]:3 = stablehlo.custom_call @bactrian.gradient_boundary(%[[G]], %[[C]], %[[X]]) {{.*}}kinds = "gradient,aux,aux", reductions = "mean,last,last"
    // CHECK: %[[N:.*]] = stablehlo.subtract %[[W]], %[[B]]#0 {bactrian.phase = "update"}
    // CHECK: %[[D:.*]] = stablehlo.add %[[N]], %[[B]]#1 {bactrian.phase = "update"}
    %d = stablehlo.add %n, %c : tensor<f32>
    // CHECK: return %[[N]], %[[D]], %[[B]]#2
    return %n, %d, %x : tensor<f32>, tensor<f32>, tensor<f32>
  }
}

// -----

// A branch below the boundary that captures a batch value reads it, too.
// CHECK-LABEL: module @one_microbatch_in_a_branch
module @one_microbatch_in_a_branch attributes {bactrian.num_microbatches = 1 : i64} {
  func.func public @main(%i: tensor<i32> {bactrian.role = "state"}, %x: tensor<i32> {bactrian.role = "batch"})
      -> (tensor<i32>, tensor<i32>) {
    // CHECK: %[[B:.*]]:2 = stablehlo.custom_call @bactrian.gradient_boundary(
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%x) {mhlo.backend_config =
      {kinds = "aux", reductions = "last"}} : (tensor<i32>) -> tensor<i32>
    // CHECK: "stablehlo.case"(%[[B]]#0)
    %c = "stablehlo.case"(%b) ({
      // CHECK-NEXT: stablehlo.return %[[B]]#1
      stablehlo.return %x : tensor<i32>
    }) : (tensor<i32>) -> tensor<i32>
    return %b, %c : tensor<i32>, tensor<i32>
  }
}
