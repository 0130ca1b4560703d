// RUN: bactrian-opt %s --split-stages --split-input-file --verify-diagnostics

module @no_accumulator attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // expected-error@+1 {{1 of the gradient boundary's values have no accumulator yet}}
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "mean"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @forward_edge_goes_down attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
    // expected-error@+1 {{forward op in stage 0 reads a forward value of stage 1}}
    %z = stablehlo.sine %y {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @backward_edge_goes_up attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // expected-error@+1 {{backward op in stage 1 reads a backward value of stage 0}}
    %z = stablehlo.sine %y {bactrian.phase = "backward", bactrian.stage = 1 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%z) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @no_phase attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{bactrian.phase is missing on stablehlo.sine}}
    %y = stablehlo.sine %x {bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @no_stage attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{bactrian.stage is missing on stablehlo.sine}}
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @stage_out_of_range attributes {bactrian.num_stages = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{bactrian.stage is 5 : i64, must be the number of one of 2 stages}}
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 5 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%y) {mhlo.backend_config =
      {kinds = "loss", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @accumulator_begins_with_an_argument attributes {bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
      -> tensor<4xf32> {
    // expected-error@+1 {{an accumulator does not begin with a value of the initialize phase}}
    %a = stablehlo.add %w, %x {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}

// -----

module @accumulator_begins_with_a_forward_value attributes {bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
    // expected-error@+1 {{an accumulator does not begin with a value of the initialize phase}}
    %a = stablehlo.add %y, %x {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config =
      {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
    return %b : tensor<4xf32>
  }
}
