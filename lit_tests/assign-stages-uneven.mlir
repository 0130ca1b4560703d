// RUN: bactrian-opt %s --assign-stages --split-input-file --verify-diagnostics

// What takes the time is one op, which is blamed.
module attributes {bactrian.num_layers = 2 : i64} {
  func.func public @main(%x: tensor<256x256xf32> {bactrian.role = "batch"}, %w: tensor<256x256xf32> {bactrian.role = "state"}, %v: tensor<256x1xf32> {bactrian.role = "state"}) -> tensor<256x1xf32> {
    // expected-warning@+1 {{times an even share of the predicted time; next to nothing is left for stage 1}}
    %a = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<256x256xf32>, tensor<256x256xf32>) -> tensor<256x256xf32>
    %b = stablehlo.dot_general %a, %v, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<256x256xf32>, tensor<256x1xf32>) -> tensor<256x1xf32>
    return %b : tensor<256x1xf32>
  }
}

// -----

// The update of a large state counts as well.
module attributes {bactrian.num_layers = 2 : i64} {
  func.func public @main(%x: tensor<4x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> (tensor<4x64xf32>, tensor<64x64xf32> {bactrian.updates = 1 : i64}) {
    // expected-warning@+1 {{stage 0 takes}}
    %a = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x64xf32>) -> tensor<4x64xf32>
    %b = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x64xf32>) -> tensor<4x64xf32>
    %n = stablehlo.sine %w {bactrian.layer = 0 : i64, bactrian.phase = "update"} : tensor<64x64xf32>
    return %b, %n : tensor<4x64xf32>, tensor<64x64xf32>
  }
}

// -----

// Even stages are not told of.
module attributes {bactrian.num_layers = 2 : i64} {
  func.func public @main(%x: tensor<4x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> tensor<4x64xf32> {
    %a = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.layer = 0 : i64, bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x64xf32>) -> tensor<4x64xf32>
    %b = stablehlo.dot_general %a, %w, contracting_dims = [1] x [0] {bactrian.layer = 1 : i64, bactrian.phase = "forward"} : (tensor<4x64xf32>, tensor<64x64xf32>) -> tensor<4x64xf32>
    return %b : tensor<4x64xf32>
  }
}
