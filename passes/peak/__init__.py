"""What one device holds while a stage function runs: the function as XLA compiles it, simulated."""
