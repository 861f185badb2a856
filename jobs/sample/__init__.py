"""Sets of samples: planned, drawn in shards, merged."""
