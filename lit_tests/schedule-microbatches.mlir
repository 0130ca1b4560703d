// RUN: bactrian-opt %s --schedule-microbatches --split-input-file | FileCheck %s

// All forwards, then all backwards; the last stage's two phases are functions of their own.
// CHECK: module @gpipe
// CHECK-SAME: bactrian.order = [["F0", "F1", "F2", "B0", "B1", "B2"], ["F0", "F1", "F2", "B0", "B1", "B2"]]
module @gpipe attributes {bactrian.num_microbatches = 3 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
    %a = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @call0(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %b = mpmd.transfer %a : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %c = mpmd.fragment_call<mesh="stage1", origin=["forward"]> @call1(%b) {bactrian.phase = "forward", bactrian.stage = 1 : i64}
      : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %d = mpmd.fragment_call<mesh="stage1", origin=["backward"]> @call1(%c) {bactrian.phase = "backward", bactrian.stage = 1 : i64}
      : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %e = mpmd.transfer %d : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %f = mpmd.fragment_call<mesh="stage0", origin=["backward"]> @call0(%e) {bactrian.phase = "backward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    return %f : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
  }
  func.func private @call0(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
  func.func private @call1(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
}

// -----

// One forward ahead on stage 0, then one of each; a fused last stage.
// CHECK: module @one_forward_one_backward
// CHECK-SAME: bactrian.order = [["F0", "F1", "B0", "F2", "B1", "B2"], ["FB0", "FB1", "FB2"]]
module @one_forward_one_backward attributes {bactrian.num_microbatches = 3 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "1f1b"} {
  func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
    %a = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @call0(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %b = mpmd.transfer %a : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %d = mpmd.fragment_call<mesh="stage1", origin=["forward_backward"]> @call1(%b) {bactrian.phase = "forward_backward", bactrian.stage = 1 : i64}
      : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %e = mpmd.transfer %d : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %f = mpmd.fragment_call<mesh="stage0", origin=["backward"]> @call0(%e) {bactrian.phase = "backward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    return %f : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
  }
  func.func private @call0(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
  func.func private @call1(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
}

// -----

// Eager: two forwards ahead on stage 0.
// CHECK: module @eager
// CHECK-SAME: bactrian.order = [["F0", "F1", "F2", "B0", "B1", "B2"], ["FB0", "FB1", "FB2"]]
module @eager attributes {bactrian.num_microbatches = 3 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "eager-1f1b"} {
  func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
    %a = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @call0(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %b = mpmd.transfer %a : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %d = mpmd.fragment_call<mesh="stage1", origin=["forward_backward"]> @call1(%b) {bactrian.phase = "forward_backward", bactrian.stage = 1 : i64}
      : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage1", tensor<4xf32>>
    %e = mpmd.transfer %d : (!mpmd.mesh_tensor<"stage1", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    %f = mpmd.fragment_call<mesh="stage0", origin=["backward"]> @call0(%e) {bactrian.phase = "backward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    return %f : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
  }
  func.func private @call0(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
  func.func private @call1(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
}

// -----

// Without gradients only forward tokens are left, under 1F1B, too; a stage without functions has nothing to do.
// CHECK: module @forward_only_and_an_idle_stage
// CHECK-SAME: bactrian.order = [["F0", "F1"], []]
module @forward_only_and_an_idle_stage attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 2 : i64, bactrian.schedule = "1f1b"} {
  func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>, <"stage1" : <["data"=1]>>>} {
    %a = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @call0(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64}
      : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
    return %a : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
  }
  func.func private @call0(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
    return %x : tensor<4xf32>
  }
}
