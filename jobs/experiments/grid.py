"""The grid of a sweep: each point is a run of its own."""

import itertools
from collections.abc import Collection, Sequence

from diffusion.errors import UserError


def points(grid: Sequence[str], known: Collection[str]) -> list[dict[str, str]]:
    """The product of axes such as `train.lr=1e-3,2e-3`: settings by flag, the last axis running fastest.

    Raises UserError for a malformed axis, and for a setting that is none of the `known` flags.
    """
    axes: dict[str, list[str]] = {}
    for axis in grid:
        name, equals, values = axis.partition("=")
        name = name.replace("_", "-")
        is_flag = any(word == "-h" or word.startswith("--") for word in values.replace(",", " ").split())
        if not (name and equals and all(values.split(","))) or is_flag:
            raise UserError(f"--grid takes SETTING=VALUE,VALUE,... such as train.lr=1e-3,2e-3; got {axis!r}")
        if name not in known:
            raise UserError(f"--grid takes settings that `train EXPERIMENT --help` shows, such as train.lr; got {name}")
        if name in axes:
            raise UserError(f"--grid must name each setting once; got {name} twice")
        axes[name] = values.split(",")
    if not axes:
        raise UserError("--grid needs at least one SETTING=VALUE,VALUE,...; got none")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def arguments(point: dict[str, str]) -> list[str]:
    """The point as on the command line; the values of a list are separated by spaces."""
    return [word for name, value in point.items() for word in (f"--{name}", *value.split())]


def run_name(sweep: str, index: int) -> str:
    # Zeros in front, so that runs sorted by name are sorted by number.
    return f"{sweep}-{index:03d}"
