"""A run on disk: its files, who may write them, where it comes from."""
