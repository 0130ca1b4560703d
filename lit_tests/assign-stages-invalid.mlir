// RUN: bactrian-opt %s --assign-stages=num-stages=3 --split-input-file --verify-diagnostics
// RUN: not bactrian-opt %s --assign-stages=boundaries=1,2 --split-input-file 2>&1 | FileCheck %s
// RUN: not bactrian-opt %s --assign-stages=boundaries=0,2 --split-input-file 2>&1 | FileCheck %s --check-prefix=FAR
// RUN: not bactrian-opt %s --assign-stages='boundaries=0,1 mesh=data=2;data=4;data=8' --split-input-file 2>&1 | FileCheck %s --check-prefix=MESHES
// RUN: not bactrian-opt %s --assign-stages='num-stages=2 remat=all,none,all' --split-input-file 2>&1 | FileCheck %s --check-prefix=WORDS
// RUN: not bactrian-opt %s --assign-stages=remat=al --split-input-file 2>&1 | FileCheck %s --check-prefix=WORD

// WORDS: remat has 3 words, the program has 2 layers
// WORD: unknown word 'al' for remat
// WORD: did you mean all?
// MESHES: mesh is data=2;data=4;data=8: 3 meshes for 2 stages
// CHECK: option boundaries of assign-stages is '1,2', must begin with 0 and grow
// FAR: cannot begin a stage at layer 2: the program has 2 layers

module attributes {bactrian.num_layers = 2 : i64} {
  // expected-error@+1 {{cannot make 3 stages of 2 layers}}
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %a = stablehlo.negate %x {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : tensor<4xf32>
    %b = stablehlo.negate %a {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : tensor<4xf32>
    return %b : tensor<4xf32>
  }
}
