"""The signals that ask a job to save and stop. jobs.runtime.signals has the same, which slurm/ may not import."""

import signal

SAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
