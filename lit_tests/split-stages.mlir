// RUN: bactrian-opt %s --split-stages --split-input-file | FileCheck %s
// RUN: bactrian-opt %s --split-stages=donate=false --split-input-file | FileCheck %s --check-prefix=KEEP

// The residual of stage 0 is a result of its forward and an operand of its backward function; buffers are reused.
// CHECK-LABEL: module @residual_stays_and_last_stage_is_fused
module @residual_stays_and_last_stage_is_fused attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: func.func public @main(%[[W:[^:]*]]: !mpmd.mesh_tensor<"stage0"{{.*}}role = "state"}, %[[X:[^:]*]]: !mpmd.mesh_tensor<"stage1"
  // CHECK-SAME: {bactrian.result = 0 : i64, bactrian.updates = 0 : i64}
  // CHECK-NEXT: %[[ZERO:.*]] = mpmd.fragment_call{{.*}} @stage0.initialize()
  // CHECK-NEXT: %[[Y:.*]] = mpmd.fragment_call{{.*}} @stage0.forward(%[[W]])
  // CHECK-NEXT: %[[YT:.*]] = mpmd.transfer %[[Y]] {{.*}} -> !mpmd.mesh_tensor<"stage1"
  // CHECK-NEXT: %[[H:.*]] = mpmd.fragment_call{{.*}} @stage1.forward_backward(%[[X]], %[[YT]])
  // CHECK-NEXT: %[[HT:.*]] = mpmd.transfer %[[H]] {{.*}} -> !mpmd.mesh_tensor<"stage0"
  // CHECK-NEXT: %[[A:.*]] = mpmd.fragment_call{{.*}} @stage0.backward(%[[Y]], %[[HT]], %[[ZERO]])
  // CHECK-NEXT: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.update(%[[W]], %[[A]])
  // CHECK-NEXT: return %[[N]]
  // CHECK: @stage0.backward({{.*}}, %{{.*}}: tensor<4xf32> {bactrian.accumulator, tf.aliasing_output = 0 : i32})
  // CHECK: @stage0.update(%{{[^:]*}}: tensor<4xf32> {tf.aliasing_output = 0 : i32}, %{{[^:]*}}: tensor<4xf32>)
  // KEEP-LABEL: module @residual_stays_and_last_stage_is_fused
  // KEEP: @stage0.backward({{.*}} {bactrian.accumulator, tf.aliasing_output = 0 : i32})
  // KEEP: @stage0.update(%{{[^:]*}}: tensor<4xf32>, %{{[^:]*}}: tensor<4xf32>)
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.sine %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.multiply %y, %x {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %h = stablehlo.cosine %z {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %g = stablehlo.multiply %h, %y {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %zero = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 0 : i64} dense<0.0> : tensor<4xf32>
    %a = stablehlo.add %zero, %g {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}

// -----

// CHECK-LABEL: module @last_stage_is_not_fused_under_gpipe
module @last_stage_is_not_fused_under_gpipe attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: mpmd.fragment_call{{.*}} @stage1.forward(
  // CHECK: mpmd.fragment_call{{.*}} @stage1.backward(
  // CHECK: mpmd.fragment_call{{.*}} @stage0.backward(
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.sine %w {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.multiply %y, %x {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %h = stablehlo.cosine %z {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %g = stablehlo.multiply %h, %y {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %zero = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 0 : i64} dense<0.0> : tensor<4xf32>
    %a = stablehlo.add %zero, %g {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}

// -----

// A skip connection: stage 1 reads the value twice, stage 2 once, and each gets it once, from stage 0.
// CHECK-LABEL: module @one_transfer_per_reading_stage
module @one_transfer_per_reading_stage attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 3 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: func.func public @main(
  // CHECK-NEXT: %[[Y:.*]] = mpmd.fragment_call{{.*}} @stage0.forward(
  // CHECK-NEXT: %[[Y1:.*]] = mpmd.transfer %[[Y]] {{.*}} -> !mpmd.mesh_tensor<"stage1"
  // CHECK-NEXT: %[[Y2:.*]] = mpmd.transfer %[[Y]] {{.*}} -> !mpmd.mesh_tensor<"stage2"
  // CHECK-NEXT: %[[Z:.*]] = mpmd.fragment_call{{.*}} @stage1.forward(%[[Y1]])
  // CHECK-NEXT: %[[Z2:.*]] = mpmd.transfer %[[Z]] {{.*}} -> !mpmd.mesh_tensor<"stage2"
  // CHECK-NEXT: mpmd.fragment_call{{.*}} @stage2.forward(%[[Y2]], %[[Z2]])
  // CHECK-NOT: mpmd.transfer
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.cosine %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %s = stablehlo.add %y, %z {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %t = stablehlo.add %s, %y {bactrian.phase = "forward", bactrian.stage = 2 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%t) {mhlo.backend_config =
      {kinds = "output", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

// Both stages read the state: one computes the new one and sends it to the other, which has a result piece, too.
// CHECK-LABEL: module @owner_sends_shared_state
module @owner_sends_shared_state attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%[[W0:[^:]*]]: !mpmd.mesh_tensor<"stage0"{{.*}}{bactrian.argument = 0 : i64{{.*}}%[[W1:[^:]*]]: !mpmd.mesh_tensor<"stage1"{{.*}}{bactrian.argument = 0
  // CHECK-SAME: -> (!mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.result = 0 : i64, bactrian.updates = 0 : i64}, !mpmd.mesh_tensor<"stage1", tensor<4xf32>> {bactrian.result = 0 : i64, bactrian.updates = 0 : i64})
  // CHECK: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.update(%[[W0]]
  // CHECK-NEXT: %[[T:.*]] = mpmd.transfer {{.*}}%[[N]] {{.*}} -> !mpmd.mesh_tensor<"stage1"
  // CHECK-NEXT: return %[[N]], %[[T]]
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.multiply %w, %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.multiply %y, %w {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}

// -----

// Stage 0 waits for stage 1's part: its own part is round 0, what needs both is round 1.
// CHECK-LABEL: module @update_rounds
module @update_rounds attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(
  // CHECK: mpmd.fragment_call{{.*}} @stage0.forward
  // CHECK: %[[P:.*]] = mpmd.fragment_call{{.*}} @stage1.update(%{{.*}}) {bactrian.phase = "update", bactrian.stage = 1 : i64}
  // CHECK-NEXT: %[[T:.*]] = mpmd.transfer {bactrian.phase = "update"} %[[P]]
  // CHECK-NEXT: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.update_1(%{{.*}}, %[[T]]) {bactrian.phase = "update", bactrian.round = 1 : i64, bactrian.stage = 0 : i64}
  // CHECK-NEXT: return %[[N]]
  // CHECK: @stage0.update_1(%{{[^:]*}}: tensor<4xf32> {tf.aliasing_output = 0 : i32}
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.cosine %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %p = stablehlo.sine %b {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<4xf32>
    %n = stablehlo.subtract %w, %p {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n : tensor<4xf32>
  }
}

// -----

// Result 1 is the old state itself: its buffer must not be reused.
// CHECK-LABEL: module @old_state_that_is_a_result_is_kept
module @old_state_that_is_a_result_is_kept attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%[[W:[^:]*]]:
  // CHECK: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.update(%[[W]]
  // CHECK: return %[[N]], %[[W]]
  // CHECK: @stage0.update(
  // CHECK-NOT: tf.aliasing_output
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32>) {
    %y = stablehlo.multiply %w, %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %w, %b {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %n, %w : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// A running mean: the next microbatch reads the old state, which must live through the step.
// CHECK-LABEL: module @state_made_in_the_forward_phase_is_not_reused
module @state_made_in_the_forward_phase_is_not_reused attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%[[W:[^:]*]]:
  // CHECK: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.forward(%[[W]]
  // CHECK-NEXT: return %[[N]]
  // CHECK: @stage0.forward(
  // CHECK-NOT: tf.aliasing_output
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}) {
    %y = stablehlo.add %w, %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "aux", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

// The next value of state 0 (on stage 0) is state 1 (on stage 1): stage 0 gets a piece of state 1, too, and the new state 1
// is brought to both.
// CHECK-LABEL: module @copied_state_is_kept_on_every_stage
module @copied_state_is_kept_on_every_stage attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%{{[^:]*}}: !mpmd.mesh_tensor<"stage0"{{.*}}argument = 0 : i64{{.*}}, %[[B0:[^:]*]]: !mpmd.mesh_tensor<"stage0"{{.*}}argument = 1 : i64{{.*}}, %{{[^:]*}}: !mpmd.mesh_tensor<"stage1"{{.*}}argument = 1 : i64
  // CHECK: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage1.update(
  // CHECK-NEXT: %[[T:.*]] = mpmd.transfer {{.*}}%[[N]] {{.*}} -> !mpmd.mesh_tensor<"stage0"
  // CHECK-NEXT: return %[[B0]], %[[T]], %[[N]]
  func.func public @main(%old: tensor<4xf32> {bactrian.role = "state"}, %new: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32> {bactrian.updates = 1 : i64}) {
    %y = stablehlo.multiply %old, %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.multiply %y, %new {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.subtract %new, %b {bactrian.phase = "update", bactrian.stage = 1 : i64} : tensor<4xf32>
    return %new, %n : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// CHECK-LABEL: module @swapped_states_are_kept
module @swapped_states_are_kept attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%[[P:[^:]*]]: {{.*}}, %[[Q:[^:]*]]: !mpmd{{.*}}argument = 1
  // CHECK: %[[L:.*]] = mpmd.fragment_call
  // CHECK-NEXT: return %[[Q]], %[[P]], %[[L]]
  func.func public @main(%p: tensor<4xf32> {bactrian.role = "state"}, %q: tensor<4xf32> {bactrian.role = "state"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32> {bactrian.updates = 1 : i64}, tensor<4xf32>) {
    %y = stablehlo.multiply %p, %q {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %q, %p, %b : tensor<4xf32>, tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// Only one of the two old buffers can be reused.
// CHECK-LABEL: module @one_value_for_two_states
module @one_value_for_two_states attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: %[[N:.*]] = mpmd.fragment_call{{.*}} @stage0.update(
  // CHECK: return %[[N]], %[[N]]
  // CHECK: @stage0.update(%{{[^:]*}}: tensor<4xf32> {tf.aliasing_output = 0 : i32}, %{{[^:]*}}: tensor<4xf32>, %{{[^:]*}}: tensor<4xf32>) -> tensor<4xf32>
  func.func public @main(%p: tensor<4xf32> {bactrian.role = "state"}, %q: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32> {bactrian.updates = 1 : i64}) {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    %n = stablehlo.add %p, %q {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    %m = stablehlo.add %n, %b {bactrian.phase = "update", bactrian.stage = 0 : i64} : tensor<4xf32>
    return %m, %m : tensor<4xf32>, tensor<4xf32>
  }
}

// -----

// Only the stage that reads the number gets it.
// CHECK-LABEL: module @microbatch_index_is_an_argument
module @microbatch_index_is_an_argument attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: func.func public @main(%[[X:[^:]*]]: !mpmd.mesh_tensor<"stage0", tensor<i32>> {bactrian.argument = 0{{.*}}, %[[M:[^:]*]]: !mpmd.mesh_tensor<"stage1", tensor<i32>> {bactrian.role = "microbatch_index"})
  // CHECK: mpmd.fragment_call{{.*}} @stage1.forward(%{{.*}}, %[[M]])
  // CHECK: @stage1.forward(%[[Y:[^:]*]]: tensor<i32>, %[[I:[^:]*]]: tensor<i32> {bactrian.microbatch_index})
  // CHECK-NEXT: %[[Z:.*]] = stablehlo.add %[[Y]], %[[I]]
  // CHECK-NEXT: return %[[Z]]
  func.func public @main(%x: tensor<i32> {bactrian.role = "batch"}) -> tensor<i32> {
    %y = stablehlo.negate %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<i32>
    %m = stablehlo.custom_call @bactrian.microbatch_index() {bactrian.phase = "forward", bactrian.stage = 1 : i64} : () -> tensor<i32>
    %z = stablehlo.add %y, %m {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<i32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "output", reductions = "accumulated"}} : (tensor<i32>) -> tensor<i32>
    return %b : tensor<i32>
  }
}

// -----

// CHECK-LABEL: module @empty_update
module @empty_update attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "1f1b"} {
  // CHECK: func.func public @main(%{{[^:]*}}: !mpmd{{.*}}) -> (!mpmd.mesh_tensor<"stage1", tensor<4xf32>> {bactrian.result = 0 : i64})
  // CHECK: %[[L:.*]] = mpmd.fragment_call{{.*}} @stage1.forward_backward(
  // CHECK-NOT: update
  // CHECK: return %[[L]]
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = stablehlo.cosine %y {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

// A branch reads values of its surroundings: they are operands of the function.
// CHECK-LABEL: module @captured_values_become_operands
module @captured_values_become_operands attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  // CHECK: %[[T:.*]] = mpmd.transfer
  // CHECK: mpmd.fragment_call{{.*}} @stage1.forward(%{{.*}}, %[[T]])
  // CHECK: @stage1.forward(%[[I:[^:]*]]: tensor<i32>, %[[Y:[^:]*]]: tensor<4xf32>)
  // CHECK-NEXT: "stablehlo.case"(%[[I]])
  // CHECK-NEXT: stablehlo.return %[[Y]]
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}, %i: tensor<i32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %z = "stablehlo.case"(%i) ({
      stablehlo.return %y : tensor<4xf32>
    }) {bactrian.phase = "forward", bactrian.stage = 1 : i64} : (tensor<i32>) -> tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "output", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}
