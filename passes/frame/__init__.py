"""The frame around the passes: base class, registry, pipelines, diagnostics, reproducers."""
