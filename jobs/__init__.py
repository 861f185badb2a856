"""What a job does, wherever it runs."""
