// RUN: bactrian-opt %s --solve-shardings=memory-bytes=1000 --split-input-file --verify-diagnostics
// RUN: not bactrian-opt %s --solve-shardings=strategy=zero4 2>&1 | FileCheck %s --check-prefix=STRATEGY
// RUN: not bactrian-opt %s --pass-pipeline='builtin.module(solve-shardings{memory-bytes=1000,0})' 2>&1 | FileCheck %s --check-prefix=BYTES
// BYTES: option memory-bytes of solve-shardings is '1000,0', must be positive numbers of bytes
// STRATEGY: unknown strategy 'zero4'
// STRATEGY: use auto, or one of data, zero1, zero2, zero3, megatron

module @no_rules attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    // expected-error@+1 {{no op of @main has an sdy.sharding_rule}}
    %y = stablehlo.sine %x {bactrian.phase = "forward"} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

// expected-error@+1 {{stage 0 has no mesh}}
module @two_stages attributes {bactrian.num_stages = 2 : i64} {
  sdy.mesh @stage1 = <["data"=2]>
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    return %x : tensor<4xf32>
  }
}

// -----

module @other_axis_of_a_stage attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // expected-error@+1 {{is not over whole axes of the mesh}}
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch", bactrian.stage_shardings = {stage0 = #sdy.sharding<@stage0, [{"model"}]>}}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=4}>} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @other_rank attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // expected-error@+1 {{has 2 dims, its value 1}}
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch", bactrian.stage_shardings = {stage0 = #sdy.sharding<@stage0, [{}, {}]>}}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=4}>} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @other_axis attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  sdy.mesh @other = <["model"=1]>
  // expected-error@+1 {{is not over whole axes of the mesh}}
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@other, [{"model"}]>}) -> tensor<4xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=4}>} : tensor<4xf32>
    return %y : tensor<4xf32>
  }
}

// -----

module @uneven attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=4]>
  // expected-error@+1 {{dim 0 of size 6 can't be split into 4 equal shards}}
  func.func public @main(%x: tensor<6xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}]>}) -> tensor<6xf32> {
    %y = stablehlo.sine %x {bactrian.phase = "forward", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=6}>} : tensor<6xf32>
    return %y : tensor<6xf32>
  }
}

// -----

// expected-error@+1 {{needs 128 devices, cpu-host has 64}}
module @too_many_devices attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=128]>
  func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
    return %x : tensor<4xf32>
  }
}

// -----

module @no_memory attributes {bactrian.num_stages = 1 : i64} {
  sdy.mesh @stage0 = <["data"=2]>
  func.func public @main(%x: tensor<1024xf32> {bactrian.role = "state"}) -> tensor<1024xf32> {
    // expected-error@+1 {{it needs at least 4.00 KiB, a device has 0.98 KiB, 3.02 KiB are missing}}
    %y = stablehlo.sine %x {bactrian.phase = "update", sdy.sharding_rule = #sdy.op_sharding_rule<([i])->([i]) {i=1024}>} : tensor<1024xf32>
    return %y : tensor<1024xf32>
  }
}
