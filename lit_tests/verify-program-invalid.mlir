// RUN: bactrian-opt %s --verify-program --split-input-file --verify-diagnostics

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}
// expected-error@+1 {{module is not flat: functions main, f; needs @main only}}
func.func private @f() {
  return
}

// -----

// expected-error@+1 {{take gradients with bactrian.value_and_grad or bactrian.grad, or pass forward_only=True}}
func.func public @main(%arg0: tensor<f32> {bactrian.role = "constant"}) -> tensor<f32> {
  return %arg0 : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %a = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{program has 2 gradient boundaries, needs 1}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

// Both lines are named.
func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %a = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{the first one is at -:}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%a) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<i32> {bactrian.role = "batch"}, %arg1: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %0 = "stablehlo.case"(%arg0) ({
    // expected-error@+1 {{gradient boundary is inside stablehlo.case}}
    %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg1) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
    stablehlo.return %b : tensor<f32>
  }) : (tensor<i32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

// No kinds and no reductions.
func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{has 1 operands and 1 results}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{kinds ['gradient', 'loss'] and reductions ['mean']}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient,loss", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{operand 0 of the gradient boundary (weight) has an unknown kind}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "weight", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{has reduction 'median', needs one of mean, sum, last, concat}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "median"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<i32> {bactrian.role = "batch"}) -> tensor<i32> {
  // expected-error@+1 {{a mean over microbatches of integers is not defined}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "aux", reductions = "mean"}} : (tensor<i32>) -> tensor<i32>
  return %b : tensor<i32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{is a scalar: there is no dim to concatenate}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "concat"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

module attributes {bactrian.num_microbatches = 4 : i64} {
func.func public @main(%arg0: tensor<2xf32> {bactrian.role = "batch"}) -> tensor<2xf32> {
  // expected-error@+1 {{result 0 of the gradient boundary is tensor<2xf32>, concat gives tensor<8xf32>}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "concat"}} : (tensor<2xf32>) -> tensor<2xf32>
  return %b : tensor<2xf32>
}
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{cannot call back to Python from a pipeline: custom call xla_python_cpu_callback}}
  %0 = stablehlo.custom_call @xla_python_cpu_callback(%arg0) {has_side_effect = true} : (tensor<f32>) -> tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{cannot call back to Python from a pipeline: custom call xla_ffi_python_cpu_callback}}
  %0 = stablehlo.custom_call @xla_ffi_python_cpu_callback(%arg0) {has_side_effect = true} : (tensor<f32>) -> tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{cannot call back to Python from a pipeline: custom call xla_ffi_partitioned_python_gpu_callback}}
  %0 = stablehlo.custom_call @xla_ffi_partitioned_python_gpu_callback(%arg0) {has_side_effect = true} : (tensor<f32>) -> tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  // expected-error@+1 {{cannot run an op with side effects in a pipeline: custom call write_file}}
  %0 = stablehlo.custom_call @write_file(%arg0) {has_side_effect = true} : (tensor<f32>) -> tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %t = stablehlo.create_token : !stablehlo.token
  // expected-error@+1 {{cannot run an infeed in a pipeline}}
  %0:2 = "stablehlo.infeed"(%t) : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0#0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %t = stablehlo.create_token : !stablehlo.token
  // expected-error@+1 {{cannot run an outfeed in a pipeline}}
  %0 = "stablehlo.outfeed"(%arg0, %t) : (tensor<f32>, !stablehlo.token) -> !stablehlo.token
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> tensor<f32> {
  %t = stablehlo.create_token : !stablehlo.token
  // expected-error@+1 {{cannot run a send to the host in a pipeline}}
  %0 = "stablehlo.send"(%arg0, %t) {channel_handle = #stablehlo.channel_handle<handle = 1, type = 2>, is_host_transfer = true} : (tensor<f32>, !stablehlo.token) -> !stablehlo.token
  // expected-error@+1 {{cannot run a receive from the host in a pipeline}}
  %1:2 = "stablehlo.recv"(%0) {channel_handle = #stablehlo.channel_handle<handle = 2, type = 3>, is_host_transfer = true} : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%1#0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<?xf32> {
  // expected-error@+1 {{cannot plan for the dynamic shape tensor<?xf32>}}
  %0 = stablehlo.custom_call @pad(%arg0) : (tensor<4xf32>) -> tensor<?xf32>
  // expected-error@+1 {{cannot plan for the dynamic shape}}
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<?xf32>) -> tensor<?xf32>
  return %b : tensor<?xf32>
}

// -----

// The first op below the boundary that reads the value is the one to blame.
func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"} loc("batch['x']")) -> (tensor<f32> {bactrian.updates = 0 : i64}) {
  %0 = stablehlo.tanh %arg1 : tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{stablehlo.add below the gradient boundary depends on batch argument batch['x'] without passing the boundary}}
  %1 = stablehlo.add %b, %0 : tensor<f32>
  %2 = stablehlo.add %1, %1 : tensor<f32>
  return %2 : tensor<f32>
}

// -----

// The batch argument itself.
func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"} loc("batch['x']")) -> (tensor<f32> {bactrian.updates = 0 : i64}) {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg1) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{below the gradient boundary depends on batch argument batch['x']}}
  %1 = stablehlo.add %b, %arg1 : tensor<f32>
  return %1 : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"} loc("batch['x']")) -> tensor<f32> {
  // expected-error@+1 {{result 0 of the step depends on batch argument batch['x']}}
  %0 = stablehlo.tanh %arg1 : tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}) -> (tensor<f32> {bactrian.updates = 0 : i64}) {
  %i = stablehlo.custom_call @bactrian.microbatch_index() : () -> tensor<f32>
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{depends on bactrian.microbatch_index()}}
  %1 = stablehlo.add %b, %i : tensor<f32>
  return %1 : tensor<f32>
}

// -----

// A value that a region captures counts as read.
func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}, %arg1: tensor<i32> {bactrian.role = "constant"}) -> tensor<f32> {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  // expected-error@+1 {{stablehlo.case below the gradient boundary depends on batch argument %arg0}}
  %0 = "stablehlo.case"(%arg1) ({
    %1 = stablehlo.add %b, %arg0 : tensor<f32>
    stablehlo.return %1 : tensor<f32>
  }) : (tensor<i32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

// expected-error@+1 {{argument 0 has bactrian.role 'weight', needs one of state, batch, constant}}
func.func public @main(%arg0: tensor<f32> {bactrian.role = "weight"}) -> tensor<f32> {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

// expected-error@+1 {{result 0 updates argument 0, which is no state}}
func.func public @main(%arg0: tensor<f32> {bactrian.role = "batch"}) -> (tensor<f32> {bactrian.updates = 0 : i64}) {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}

// -----

// expected-error@+1 {{results 0 and 1 both update argument 0}}
func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}) -> (tensor<f32> {bactrian.updates = 0 : i64}, tensor<f32> {bactrian.updates = 0 : i64}) {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b, %b : tensor<f32>, tensor<f32>
}

// -----

// expected-error@+1 {{state %arg0 changes its type from tensor<f32> to tensor<bf16>}}
func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}) -> (tensor<bf16> {bactrian.updates = 0 : i64}) {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  %0 = stablehlo.convert %b : (tensor<f32>) -> tensor<bf16>
  return %0 : tensor<bf16>
}

// -----

// expected-error@+1 {{argument 0 has no bactrian.role, needs one of state, batch, constant}}
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %b = stablehlo.custom_call @bactrian.gradient_boundary(%arg0) {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
  return %b : tensor<f32>
}
