"""Programs of one device: what each op becomes on a shard, and the collectives between shards."""
