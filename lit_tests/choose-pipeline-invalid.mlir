// RUN: bactrian-opt %s --choose-pipeline=num-stages=3 --verify-diagnostics
// RUN: not bactrian-opt %s --choose-pipeline=boundaries=0,2 2>&1 | FileCheck %s --check-prefix=FAR
// RUN: not bactrian-opt %s --choose-pipeline=boundaries=1 2>&1 | FileCheck %s --check-prefix=BOUNDARIES
// RUN: not bactrian-opt %s --choose-pipeline='num-stages=1 mesh=data=1;data=2' 2>&1 | FileCheck %s --check-prefix=COUNTS
// RUN: not bactrian-opt %s --choose-pipeline=mesh=data=128 2>&1 | FileCheck %s --check-prefix=LARGE
// RUN: not bactrian-opt %s --choose-pipeline='measured="0-2 on data=1 takes 2.0"' 2>&1 | FileCheck %s --check-prefix=MEASURED
// RUN: not bactrian-opt %s --choose-pipeline='measured="0-3 on data=1 of 8 takes 2.0 1.0"' 2>&1 | FileCheck %s --check-prefix=LAYERS
// RUN: not bactrian-opt %s --choose-pipeline=schedule=none 2>&1 | FileCheck %s --check-prefix=SCHEDULE
// RUN: not bactrian-opt %s --choose-pipeline=memory-share=1.5 2>&1 | FileCheck %s --check-prefix=SHARE
// RUN: not bactrian-opt %s --choose-pipeline=memory-share=1,0.5 2>&1 | FileCheck %s --check-prefix=SHARES

// FAR: cannot begin a stage at layer 2: the program has 2 layers
// BOUNDARIES: option boundaries of choose-pipeline is '1', must begin with 0 and grow
// COUNTS: disagree about the number of stages: num-stages 1 means 1, mesh 'data=1;data=2' means 2
// LARGE: 1 stage on data=128 needs 128 devices, cpu-host has 64
// MEASURED: cannot read measured stage '0-2 on data=1 takes 2.0'
// LAYERS: a measured stage ends at layer 2, the program has 2 layers
// SHARE: option memory-share of choose-pipeline is '1.5', must be numbers above 0 and up to 1
// SHARES: option memory-share of choose-pipeline is '1,0.5', cpu-host has 1 groups of hosts
// SCHEDULE: unknown schedule 'none'
module attributes {bactrian.num_layers = 2 : i64, bactrian.num_microbatches = 8 : i64} {
  // expected-error@+1 {{cannot make 3 stages of 2 layers}}
  func.func public @main(%v: tensor<1024x1024xf32> {bactrian.role = "state"}, %w: tensor<1024x1024xf32> {bactrian.role = "state"}, %x: tensor<512x1024xf32> {bactrian.role = "batch"}) -> tensor<512x1024xf32> {
    %a = stablehlo.dot_general %x, %v, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
    %b = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<512x1024xf32>, tensor<1024x1024xf32>) -> tensor<512x1024xf32>
    %s = stablehlo.custom_call @bactrian.gradient_boundary(%b) {mhlo.backend_config = {kinds = "output", reductions = "sum"}} : (tensor<512x1024xf32>) -> tensor<512x1024xf32>
    return %s : tensor<512x1024xf32>
  }
}
