"""Protects a job from its surroundings: a terminal that has gone, a notebook's variables, a figure that fails."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

Say = Callable[[str], None]

_CHANGES_RESULTS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that begin so change what is computed, behind the settings' back; `accelerate launch` sets many of them."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """While entered, neither a stdout that cannot be written nor variables meant for others touch the work.

    If the terminal is gone, the disk is full or the pipe is closed, whatever is printed from then on is dropped.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook hands down a backend that may not be installed here
    for name in [name for name in os.environ if name.startswith(_CHANGES_RESULTS)]:
        del os.environ[name]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lenient(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def open_standard_streams() -> None:
    """Opens /dev/null for a stream that a shell has closed with `>&-`, or the next opened file would become it.

    Letters that the terminal does not have, of a folder's name for example, are replaced.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def decorate(what: str, draw: Callable[[], None], say: Say, log: Say | None = None) -> str | None:
    """Draws pictures of a result that is safe on the disk; if that fails, the result stays good.

    Then it says so, returns the sentence, and gives `log` the traceback.
    """
    try:
        draw()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sentence = f"{what} could not be drawn ({reason}); the same command draws them again"
        if log is not None:
            log(traceback.format_exc())
        say(f"WARNING: {sentence}")
        return sentence
    return None


class _Lenient:
    """A text stream that drops what its target cannot take."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, text: str) -> int:
        try:
            self._target.write(text)
        except UnicodeEncodeError:
            encoding = self._target.encoding
            self._target.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._target.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Sends what is still in the target's buffer, and all that follows, to /dev/null."""
        try:
            # Under the same number, because the stream keeps what it could not write, and tries again at each flush.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._target.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # it is closed, or no file
            self._target = io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
