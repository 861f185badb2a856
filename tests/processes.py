"""Which tests start processes of their own: `make check` leaves those out, and any other that starts one fails."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import pytest

from slurm import local
from tests import held, launching

MARKERS = ("processes", "slurm", "gpu", "soak")
"""Of tests that may start some."""
STARTERS = (subprocess, multiprocessing, local, launching.start, launching.launch, launching.done, held.start_held)
_forbidden = False


def named(code: CodeType) -> set[str]:
    """All names that a function's code uses, those of the functions within it as well."""
    return set(code.co_names).union(*(named(const) for const in code.co_consts if isinstance(const, CodeType)))


def starts_some(function: FunctionType, seen: frozenset[FunctionType] = frozenset()) -> bool:
    """Whether the function, or one of its module that it calls, uses what starts processes."""
    if function in seen:
        return False
    used = [function.__globals__.get(name) for name in named(function.__code__)]
    own = [f for f in used if isinstance(f, FunctionType) and f.__module__ == function.__module__]
    return any(value is starter for value in used for starter in STARTERS) or any(
        starts_some(f, seen | {function}) for f in own
    )


@contextmanager
def forbidden(forbid: bool) -> Iterator[None]:
    """While entered, starting Python fails, or does no longer: what libraries ask the system for may be."""
    global _forbidden
    before, _forbidden = _forbidden, forbid
    try:
        yield
    finally:
        _forbidden = before


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbidden and (
        event == "os.fork" or (event == "subprocess.Popen" and sys.executable in map(str, arguments[1]))
    ):
        pytest.fail("a test that starts a process must say so, else `make check` runs it: @pytest.mark.processes")


sys.addaudithook(_watch)
