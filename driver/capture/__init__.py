"""From a train step and its arguments to one StableHLO module."""
