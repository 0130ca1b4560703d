"""A compiled step on this process's share of the cluster."""
