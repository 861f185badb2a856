"""The errors that launch.py prints as one sentence: `diffusion.errors` once more, which slurm/ may not import."""


class UserError(Exception):
    """The user asks for what this cluster cannot do; the sentence says what would be right. Exit code 2."""


class SlurmError(Exception):
    """Slurm refuses, or does not answer. Exit code 1."""
