"""Measures alternatives in turn on one machine, each in a process of its own, and says how they compare.

What disturbs the machine disturbs all alternatives of a round, so their ratio is taken within the round.
"""

import contextlib
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "accelerate", "denoising_diffusion_pytorch", "torchvision.transforms", "torch.profiler")
"""What alternatives import, which takes each of them some 5 CPU seconds."""
Measurements = Generator[dict[str, float], None, None]
"""What a measured process yields: one round after another, quantities by name."""


class Alternative:
    """A process that measures itself, one round each time it is asked."""

    context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
    """Not forked: each imports everything anew, and CUDA does not work in the fork of a process that has used it."""

    def __init__(self, function: Callable[..., Measurements], *arguments: Any) -> None:
        self._connection, theirs = self.context.Pipe()
        # No daemon, because a daemon may have no children, and the library's `Trainer` loads images in some.
        self._process = self.context.Process(target=_serve, args=(theirs, function, arguments), daemon=False)
        self._process.start()
        # While this copy is open, `recv` does not notice that the process has died.
        theirs.close()

    def measure(self) -> dict[str, float]:
        """Raises EOFError if the process has failed; it has printed why."""
        self._connection.send(None)
        return dict(self._connection.recv())

    def close(self) -> None:
        """Lets the process end in its own way: it has folders and processes of its own to tidy up."""
        self._connection.close()
        self._process.join()


def rehearse() -> None:
    """From now on the libraries are imported once, in a process that all alternatives are forked from."""
    multiprocessing.set_forkserver_preload([*LIBRARIES])
    Alternative.context = multiprocessing.get_context("forkserver")


def _serve(connection: Connection, function: Callable[..., Measurements], arguments: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # what libraries print does not belong into the table
    with contextlib.closing(function(*arguments)) as rounds:
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            connection.send(next(rounds))


def in_turn(
    alternatives: Mapping[str, Alternative], rounds: int, *, warm_up: bool = True
) -> dict[str, list[dict[str, float]]]:
    """The measurements of each alternative, round by round, after a first round that only warms up if asked for.

    The order turns round from one round to the next.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in alternatives}
    try:
        for i in range(0 if warm_up else 1, rounds + 1):
            # What changes steadily, such as the clock of a machine that warms up, then favours none of them.
            for name in list(alternatives)[:: 1 if i % 2 else -1]:
                measured = alternatives[name].measure()
                if i > 0:
                    found[name].append(measured)
    finally:
        for alternative in alternatives.values():
            alternative.close()
    return found


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio, a quantity that has to stay below a limit, or one that is only told."""

    what: str
    ours: str
    other: str
    value: float
    low: float
    high: float
    target: str = ""
    reached: bool | None = None
    """None where there is no target."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ratio(what: str, ours: list[float], other: list[float], peer: str, at_least: float | None) -> Row:
    """How many times more images/s are ours than another's, in the same rounds: median, least and largest ratio."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    value = statistics.median(ratios)
    target = ("", None) if at_least is None else (f">= {at_least:g}", value >= at_least)
    return Row(
        what,
        f"{statistics.median(ours):.3g} images/s",
        f"{peer} {statistics.median(other):.3g} images/s",
        value,
        min(ratios),
        max(ratios),
        *target,
    )


def limit(what: str, unit: str, values: list[float], at_most: float | None) -> Row:
    """A quantity that must not be larger than a limit, if there is one: median, least and largest."""
    value = statistics.median(values)
    shown = f"{value:.3g} {unit}".strip()
    target = ("", None) if at_most is None else (f"<= {at_most:g}", value <= at_most)
    return Row(what, shown, "", value, min(values), max(values), *target)


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    import torch  # here, because the processes that are measured import it in their own time

    found: dict[str, object] = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        gpu, driver = torch.cuda.get_device_properties(0), Path("/sys/module/nvidia/version")
        found["gpu"] = f"{gpu.name}, {gpu.total_memory // 2**20:,} MB"
        found["gpus"] = torch.cuda.device_count()
        found["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| what | ours | other | value | spread | target | reached |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row.low:.3g} to {row.high:.3g}" if row.low < row.high else ""  # one measurement has none
        reached = {True: "yes", False: "**no**", None: ""}[row.reached]
        lines.append(
            f"| {row.what} | {row.ours} | {row.other} | {row.value:.3g} | {spread} | {row.target} | {reached} |"
        )
    return "\n".join(lines)
