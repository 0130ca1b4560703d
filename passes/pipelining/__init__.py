"""Inter-operator planning: what layers take on meshes, and the search for stages. No MLIR but in `layer_programs`."""
