"""How a step is cut: layers, stages, and the functions of each stage."""
