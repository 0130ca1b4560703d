// RUN: bactrian-opt %s --flatten-calls --split-input-file --mlir-print-debuginfo | FileCheck %s

// CHECK-LABEL: func.func public @main
// CHECK-SAME: bactrian.role = "state"
// CHECK-SAME: jax.result_info = "result"
// CHECK-NEXT: %[[FIRST:.*]] = stablehlo.add %arg0, %arg0
// CHECK-NEXT: %[[SECOND:.*]] = stablehlo.add %[[FIRST]], %[[FIRST]]
// CHECK-NEXT: return %[[SECOND]]
// CHECK-NOT: func.func
func.func public @main(%arg0: tensor<4xf32> {bactrian.role = "state"}) -> (tensor<4xf32> {jax.result_info = "result"}) {
  %0 = call @double(%arg0) : (tensor<4xf32>) -> tensor<4xf32>
  %1 = call @double(%0) : (tensor<4xf32>) -> tensor<4xf32>
  return %1 : tensor<4xf32>
}
func.func private @double(%arg0: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
  return %0 : tensor<4xf32>
}

// -----

// A function that calls a function, and one that nobody calls.
// CHECK-LABEL: func.func public @main
// CHECK-NEXT: %[[NEGATED:.*]] = stablehlo.negate %arg0
// CHECK-NEXT: %[[SUM:.*]] = stablehlo.add %[[NEGATED]], %arg0
// CHECK-NEXT: return %[[SUM]]
// CHECK-NOT: func.func
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @outer(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
func.func private @outer(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @inner(%arg0) : (tensor<f32>) -> tensor<f32>
  %1 = stablehlo.add %0, %arg0 : tensor<f32>
  return %1 : tensor<f32>
}
func.func private @inner(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.negate %arg0 : tensor<f32>
  return %0 : tensor<f32>
}
func.func private @dead(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @inner(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

// Calls in the body of a loop are inlined too; a function may return its own argument.
// CHECK-LABEL: func.func public @main
// CHECK: stablehlo.while
// CHECK: } do {
// CHECK-NEXT: %[[NEXT:.*]] = stablehlo.subtract %iterArg
// CHECK-NEXT: stablehlo.return %[[NEXT]]
// CHECK-NOT: func.func
func.func public @main(%arg0: tensor<i32>, %arg1: tensor<i32>) -> tensor<i32> {
  %0 = stablehlo.while(%iterArg = %arg0) : tensor<i32>
  cond {
    %1 = stablehlo.compare NE, %iterArg, %arg1, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %1 : tensor<i1>
  } do {
    %1:2 = func.call @body(%iterArg, %arg1) : (tensor<i32>, tensor<i32>) -> (tensor<i32>, tensor<i32>)
    stablehlo.return %1#0 : tensor<i32>
  }
  return %0 : tensor<i32>
}
func.func private @body(%arg0: tensor<i32>, %arg1: tensor<i32>) -> (tensor<i32>, tensor<i32>) {
  %0 = stablehlo.subtract %arg0, %arg1 : tensor<i32>
  return %0, %arg1 : tensor<i32>, tensor<i32>
}

// -----

// The call's name stack comes before the op's own; the line stays the op's.
// CHECK-LABEL: func.func public @main
// CHECK-NEXT: stablehlo.negate %arg0 : tensor<f32> loc(#[[NEGATE:.*]])
// CHECK-NEXT: stablehlo.tanh {{.*}} loc(#[[TANH:.*]])
// CHECK-DAG: #[[LINE:.*]] = loc("model.py":7:1)
// CHECK-DAG: #[[NEGATE]] = loc("jit(step)/block_1/neg"(#[[LINE]]))
// CHECK-DAG: #[[TANH]] = loc("jit(step)/tanh"
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @f(%arg0) : (tensor<f32>) -> tensor<f32> loc("jit(step)/block_1"("train.py":3:1))
  return %0 : tensor<f32>
}
func.func private @f(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.negate %arg0 : tensor<f32> loc("neg"("model.py":7:1))
  %1 = stablehlo.tanh %0 : tensor<f32> loc("jit(step)/tanh"("model.py":8:1))
  return %1 : tensor<f32>
}

// -----

// CHLO becomes StableHLO; our own custom calls stay.
// CHECK-LABEL: func.func public @main
// CHECK-NOT: chlo.
// CHECK: stablehlo.custom_call @bactrian.stage_boundary
// CHECK-NOT: chlo.
// CHECK: return
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = chlo.erf %arg0 : tensor<f32> -> tensor<f32>
  %1 = call @mark(%0) : (tensor<f32>) -> tensor<f32>
  return %1 : tensor<f32>
}
func.func private @mark(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.custom_call @bactrian.stage_boundary(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}

// -----

// A composite is a call of its decomposition.
// CHECK-LABEL: func.func public @main
// CHECK-NEXT: stablehlo.cosine
// CHECK-NOT: composite
func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.composite "my.op" %arg0 {decomposition = @my_op} : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
func.func private @my_op(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = stablehlo.cosine %arg0 : tensor<f32>
  return %0 : tensor<f32>
}
