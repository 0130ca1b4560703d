// RUN: bactrian-opt %s --loop-microbatches --split-input-file --verify-diagnostics

// expected-error@+1 {{the module has no @main}}
module @no_main attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64} {
}

// -----

// expected-error@+1 {{bactrian.num_stages is missing}}
module @no_stages attributes {bactrian.num_microbatches = 2 : i64} {
  func.func @main() {
    return
  }
}

// -----

// expected-error@+1 {{bactrian.num_microbatches is missing}}
module @no_microbatches attributes {bactrian.num_stages = 1 : i64} {
  func.func @main() {
    return
  }
}
