// RUN: bactrian-opt %s --fold-reversals --split-input-file --verify-diagnostics

// expected-error@+1 {{the module has no @main}}
module @no_main {
}
