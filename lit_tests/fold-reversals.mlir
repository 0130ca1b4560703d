// RUN: bactrian-opt %s --fold-reversals --split-input-file | FileCheck %s

// A kernel that is reversed twice is read as it is, and who else reads a reversed one keeps it.
// CHECK-LABEL: module @twice
module @twice {
  // CHECK: func.func public @main(%[[X:.*]]: tensor<1x8x8x2xf32>, %[[K:.*]]: tensor<3x3x2x2xf32>)
  func.func public @main(%x: tensor<1x8x8x2xf32>, %k: tensor<3x3x2x2xf32>) -> (tensor<1x6x6x2xf32>, tensor<1x6x6x2xf32>, tensor<3x3x2x2xf32>) {
    // CHECK: %[[R:.*]] = stablehlo.reverse %[[K]], dims = [0, 1]
    // CHECK-NEXT: stablehlo.convolution(%[[X]], %[[K]]) {{.*}}window = {reverse = [true, true]}
    // CHECK-NEXT: stablehlo.convolution(%[[X]], %[[K]]) {{.*}}window = {reverse = [false, true]}
    %r = stablehlo.reverse %k, dims = [0, 1] : tensor<3x3x2x2xf32>
    %y = stablehlo.convolution(%x, %r) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x2xf32>, tensor<3x3x2x2xf32>) -> tensor<1x6x6x2xf32>
    %z = stablehlo.convolution(%x, %r) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f], window = {reverse = [true, false]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x8x2xf32>, tensor<3x3x2x2xf32>) -> tensor<1x6x6x2xf32>
    return %y, %z, %r : tensor<1x6x6x2xf32>, tensor<1x6x6x2xf32>, tensor<3x3x2x2xf32>
  }
}

// -----

// Features are reversed too, which no window can do.
// CHECK-LABEL: module @features
module @features {
  func.func public @main(%x: tensor<1x8x2xf32>, %k: tensor<3x2x2xf32>) -> tensor<1x6x2xf32> {
    // CHECK: %[[R:.*]] = stablehlo.reverse
    // CHECK-NEXT: stablehlo.convolution(%{{.*}}, %[[R]])
    %r = stablehlo.reverse %k, dims = [0, 1] : tensor<3x2x2xf32>
    %y = stablehlo.convolution(%x, %r) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x2xf32>, tensor<3x2x2xf32>) -> tensor<1x6x2xf32>
    return %y : tensor<1x6x2xf32>
  }
}
