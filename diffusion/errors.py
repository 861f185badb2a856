"""The errors that launch.py prints as one sentence; every other one is a bug of ours, and shows its traceback.

They live at the bottom, because all of diffusion/ and jobs/ raises them. slurm/, which imports neither, has a pair of
its own.
"""

import os


class UserError(Exception):
    """The user asks for what cannot be; the sentence says what would be right. Exit code 2.

    It is not a ValueError: that is what Python raises for our own mistakes, and tyro adds words of its own to it.
    """


class OutsideError(Exception):
    """Something outside this program fails, whatever the user has asked for. Exit code 1."""


def reason(error: OSError) -> str:
    """Says which file it is about, where that is known, and what the system says."""
    said = str(error.strerror or error)
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"
