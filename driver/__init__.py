"""What users touch: capture, planning, compilation, commands and reports."""
