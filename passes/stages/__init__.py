"""How a step is cut: layers, stages, the functions of each stage, and schedules."""
