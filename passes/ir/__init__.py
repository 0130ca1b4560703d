"""Reading and writing the IR: ``@main``, attributes, meshes, builders and clones."""
