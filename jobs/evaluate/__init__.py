"""Evaluations: planned, computed in units, reported."""
