"""What surrounds a job's work in each process: signals, devices, the other processes."""
