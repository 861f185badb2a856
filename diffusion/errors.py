"""The errors that launch.py prints as one sentence; every other one is a bug of ours, and shows its traceback.

They live at the bottom, because all rooms raise them. slurm/, which imports none of these rooms, has a pair of its own.
"""


class UserError(Exception):
    """The user asks for what cannot be; the sentence says what would be right. Exit code 2.

    It is not a ValueError: that is what Python raises for our own mistakes, and tyro adds words of its own to it.
    """


class OutsideError(Exception):
    """Something outside this program fails, whatever the user has asked for. Exit code 1."""
