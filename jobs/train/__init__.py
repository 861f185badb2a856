"""One training: its job, its loop, its state, its record."""
