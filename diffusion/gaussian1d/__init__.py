"""The Gaussian mixture in one dimension: the problem whose every answer is known."""
