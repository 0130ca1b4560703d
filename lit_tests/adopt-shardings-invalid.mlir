// RUN: bactrian-opt --adopt-shardings --split-input-file --verify-diagnostics %s

sdy.mesh @users = <["data"=4]>
sdy.mesh @stage0 = <["data"=2, "model"=4]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{a sharding constraint is over a mesh data=4, but each stage has the mesh data=2,model=4}}
  %0 = sdy.sharding_constraint %arg0 <@users, [{"data"}]> : tensor<8xf32>
  %1 = sdy.sharding_constraint %0 <@users, [{"data"}]> : tensor<8xf32>
  return %1 : tensor<8xf32>
}

// -----

sdy.mesh @users = <["data"=2, "expert"=2]>
sdy.mesh @stage0 = <["data"=2, "model"=4]>
// expected-error@+1 {{the sharding of an argument is over a mesh data=2,expert=2}}
func.func public @main(%arg0: tensor<8xf32> {sdy.sharding = #sdy.sharding<@users, [{"data"}]>}) -> tensor<8xf32> {
  return %arg0 : tensor<8xf32>
}

// -----

sdy.mesh @users = <["model"=4]>
sdy.mesh @stage0 = <["data"=2, "model"=4]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{a sharding constraint is over a part of an axis}}
  %0 = sdy.sharding_constraint %arg0 <@users, [{"model":(1)2}]> : tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

sdy.mesh @stage0 = <["data"=2, "model"=4]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{a sharding constraint has a mesh of its own}}
  %0 = sdy.sharding_constraint %arg0 <mesh<["data"=2]>, [{"data"}]> : tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

sdy.mesh @users = <["data"=2]>
sdy.mesh @stage0 = <["data"=2, "model"=4]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{a sharding constraint has replicated or unreduced axes}}
  %0 = sdy.sharding_constraint %arg0 <@users, [{?}], replicated={"data"}> : tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

sdy.mesh @users = <["data"=2]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{shard_map is not supported yet}}
  %0 = sdy.manual_computation(%arg0) in_shardings=[<@users, [{"data"}]>] out_shardings=[<@users, [{"data"}]>] manual_axes={"data"} (%arg1: tensor<4xf32>) {
    sdy.return %arg1 : tensor<4xf32>
  } : (tensor<8xf32>) -> tensor<8xf32>
  return %0 : tensor<8xf32>
}

// -----

sdy.mesh @stage0 = <["data"=2, "model"=4]>
func.func public @main(%arg0: tensor<8xf32>) -> tensor<8xf32> {
  // expected-error@+1 {{a sharding constraint is not written in Shardy's dialect}}
  %0 = stablehlo.custom_call @Sharding(%arg0) {mhlo.sharding = "{devices=[8]<=[8]}"} : (tensor<8xf32>) -> tensor<8xf32>
  return %0 : tensor<8xf32>
}
