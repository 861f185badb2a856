"""Runs and sweeps seen from outside: `status`, `logs`, `cancel`, `sync`."""
