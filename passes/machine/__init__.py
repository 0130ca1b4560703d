"""What a machine can do: costs of ops, clusters, meshes of devices, times of collectives. No MLIR."""
