// RUN: bactrian-opt %s --count-collectives --split-input-file --verify-diagnostics

module @all_devices {
  func.func private @stage0.forward(%x: tensor<4x4xf32>) -> tensor<4x4xf32> {
    // expected-error@+1 {{cannot count what stablehlo.all_reduce sends: replica_groups is empty}}
    %s = "stablehlo.all_reduce"(%x) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<> : tensor<0x0xi64>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %c = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %c : tensor<f32>
    }) : (tensor<4x4xf32>) -> tensor<4x4xf32>
    return %s : tensor<4x4xf32>
  }
}
