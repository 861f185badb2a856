"""Metrics of any data with confidence intervals, and with the value that a perfect model would get (the floor)."""
