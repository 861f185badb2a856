"""A run on disk: its files, its checkpoints, who may write them, what has stopped it, where it comes from."""
