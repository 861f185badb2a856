"""Runs seen from outside: `status`, `logs`, `cancel`."""
