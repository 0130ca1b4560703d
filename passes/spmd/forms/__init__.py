"""What each kind of op becomes on a device's shards, one file for each kind."""
