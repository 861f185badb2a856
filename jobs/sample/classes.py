"""Classes as on the command line, `7`, `3,5` or `0-9`, and their guidance. Imports neither torch nor numpy."""

import math
import re
from itertools import groupby

from diffusion.settings import require

RULE = "--classes takes classes and ranges of them, each class once, such as 7, 3,5 or 0-9"


def parse(text: str, num_classes: int) -> tuple[int, ...]:
    """The classes in the order given; raises SettingsError for what is none, comes twice or does not exist."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        require(match is not None, RULE, repr(text))
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, "a range of --classes begins with the smaller number", part.strip())
        require(last < num_classes, f"--classes must lie between 0 and {num_classes - 1}", part.strip())
        found += range(first, last + 1)
    require(len(set(found)) == len(found), RULE, repr(text))
    return tuple(found)


def check_guidance(scale: float) -> None:
    """Raises SettingsError for a scale that exaggerates nothing."""
    require(math.isfinite(scale) and scale >= 0, "--guidance must be at least 0 and finite", scale)


def predictions(scale: float | None, autoguided: bool = False) -> int:
    """How many predictions networks make at each step, as diffusion/process/guidance.py asks for."""
    return (1 if scale in (None, 0, 1) else 2) * (2 if autoguided else 1)


def label(classes: tuple[int, ...]) -> str:
    """Names classes in file names, as in `0-9` and `3+5`."""
    # Among neighbours, the class less its place is the same number.
    runs = [[k for _, k in run] for _, run in groupby(enumerate(classes), lambda pair: pair[1] - pair[0])]
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
