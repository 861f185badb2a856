"""`python -S -m slurm.shield COMMAND...` runs the command while the signals that mean "save" are blocked.

Slurm may send USR2 in the first second of a job, which is still importing and would be killed. Blocked signals wait
through exec until the job has its handlers and unblocks them (`jobs.runtime.signals.SignalWatch`).
"""

import os
import signal
import sys

from slurm.signals import SAVE

signal.pthread_sigmask(signal.SIG_BLOCK, SAVE)
os.execv(sys.argv[1], sys.argv[1:])
