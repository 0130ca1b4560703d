"""Stage functions as XLA takes them, compiles them and reports on them."""
