"""What is trained and drawn: data, models, their processes and how well they do. Knows nothing of runs."""
