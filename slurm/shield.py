"""`python -S -m slurm.shield ARGUMENTS...` runs Python with these while the signals that mean "save" are blocked.

Slurm may send USR2 in the first second of a job, which is still importing and would be killed by it. A blocked signal
is not lost: it waits, also through exec, until the job's handlers are there (`jobs.runtime.signals.SignalWatch`).
"""

import os
import signal
import sys

from slurm.signals import SAVE

signal.pthread_sigmask(signal.SIG_BLOCK, SAVE)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
