"""This room holds one training: its job, its loop, its state, its record."""
