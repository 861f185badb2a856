"""Data sets: fetched before a job, checked by hash, read as arrays; without torch."""
