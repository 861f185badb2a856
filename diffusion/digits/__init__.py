"""Metrics of digits, computed with a classifier of digits."""
