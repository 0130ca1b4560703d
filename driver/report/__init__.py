"""What the commands print: tables of plans, explanations and comparisons."""
