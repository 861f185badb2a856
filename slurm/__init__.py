"""Where a job runs: on a Slurm cluster, or in processes on this machine."""
