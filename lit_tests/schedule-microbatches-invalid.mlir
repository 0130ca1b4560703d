// RUN: bactrian-opt %s --schedule-microbatches --split-input-file --verify-diagnostics

module @unknown_schedule attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "zigzag"} {
  // expected-error@+1 {{unknown schedule 'zigzag'}}
  func.func @main() {
    return
  }
}

// -----

// expected-error@+1 {{bactrian.num_stages is missing}}
module @no_stages attributes {bactrian.num_microbatches = 2 : i64, bactrian.schedule = "gpipe"} {
  func.func @main() {
    return
  }
}
