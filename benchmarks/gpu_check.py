"""What has to hold on a GPU, and what it is worth, in a few minutes: `python -m benchmarks.gpu_check`.

The tests marked gpu, a training with an interruption and its digits come first, side by side, for none of them is
timed; then the benchmarks, each alone. Each part is a process with a time limit of its own; one that fails is reported
and does not stop the others. The table and the numbers are written as they come, so that a cut leaves what there is.
With --device cpu all of it is rehearsed small. The exit code is 1 if a part failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.comparison import Row, machine, table
from diffusion.data.mnist import MNIST
from diffusion.problems.mnist import MnistProblem
from jobs.storage.provenance import ROOT

MINUTES = 8.0
REHEARSAL_PATIENCE = 2
"""How many times longer a rehearsal may take: a machine of two cores has other work, and compilers are slow there."""
THREADS = 2
"""Threads of each process of a GPU's parts side by side: some 20 processes, whose threads would wait for each other."""
GRACE_S = 20.0
"""How long a part may take to tidy up after its time is over."""


@dataclass(frozen=True)
class Part:
    """A process that tests or measures something, and ends with 0 if all is well."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass
class Check:
    """What has been found so far, and where it is written."""

    folder: Path
    device: str
    deadline: float
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run_in_turn(self, parts: list[Part], threads: int | None) -> None:
        for part in parts:
            self.run(part, threads)

    def run(self, part: Part, threads: int | None = None) -> None:
        """Runs a part to its end or to the end of its time, and writes what it has found."""
        started = time.monotonic()
        limit_s = min(part.limit_s, self.deadline - started)
        numbers, log = self.folder / f"{part.name}.json", self.folder / f"{part.name}.txt"
        if limit_s <= 0:
            outcome = "not run: the time for all parts was over"
        else:
            outcome = self._run(part.arguments, limit_s, log, threads)
        rows = json.loads(numbers.read_text())["rows"] if numbers.exists() else []
        missed = [row["what"] for row in rows if row["reached"] is False]
        if outcome == "passed" and missed:
            outcome = f"missed a target: {', '.join(missed)}"
        seconds = round(time.monotonic() - started, 1)
        print(f"{part.name}: {outcome}, {seconds} s", flush=True)
        with self.lock:
            passed = outcome == "passed"
            self.found[part.name] = {"outcome": outcome, "passed": passed, "seconds": seconds, "rows": rows}
            self._write()

    def _run(self, arguments: tuple[str, ...], limit_s: float, log: Path, threads: int | None) -> str:
        """Says how the process ended; what it printed is in the log."""
        limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        env = {**limited, **os.environ, "WANDB_MODE": "disabled", "GPU_TEST_DEVICE": self.device}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
                return "passed" if code == 0 else f"failed with exit code {code}: see {log.name}"
            except subprocess.TimeoutExpired:
                # As Ctrl-C at a terminal does: tests end what they have started in sessions of its own.
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                return f"cut off after {limit_s:.0f} s: see {log.name}"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _write(self) -> None:
        rows = [Row(**row) for part in self.found.values() for row in part["rows"]]
        parts = [f"| {name} | {part['outcome']} | {part['seconds']} s |" for name, part in self.found.items()]
        lines = ["| part | outcome | time |", "|---|---|---|", *parts, "", table(rows)]
        facts = ", ".join(f"{name} {value}" for name, value in machine().items())
        (self.folder / "gpu-check.md").write_text(f"{self.device}: {facts}\n\n" + "\n".join(lines) + "\n")
        found = {"machine": machine(), "device": self.device, "parts": self.found}
        (self.folder / "gpu-check.json").write_text(json.dumps(found, indent=2) + "\n")


def parts(device: str, folder: Path) -> tuple[list[Part], list[Part]]:
    """Those that may run side by side, and those that need the machine for themselves."""
    small = ("--small", "--rounds", "1") if device == "cpu" else ("--rounds", "2")
    patience = REHEARSAL_PATIENCE if device == "cpu" else 1

    def tests(name: str, limit_s: float, at_once: int) -> Part:
        # Each of them waits for processes to start and to compile, most of the time.
        # (pytest-benchmark, which is installed where GPUs are, would warn of that, and warnings are errors here.)
        spread = ("--numprocesses", str(at_once), "--maxschedchunk", "1", "-p", "no:benchmark")
        arguments = ("pytest", "-m", "gpu", f"tests/gpu/{name}.py", "--durations", "10")
        return Part(name, arguments if device == "cpu" else (*arguments, *spread), patience * limit_s)

    def benchmark(name: str, limit_s: float) -> Part:
        experiment = "mnist-small" if device == "cpu" else "mnist"
        where = ("--device", device, "--runs", str(folder / "runs"), "--sampled", f"{experiment}/survival")
        arguments = ("benchmarks", name, *where, *small, "--json", str(folder / f"{name}.json"))
        return Part(name, arguments, patience * limit_s)

    side_by_side = [benchmark("survival", 240), tests("test_exact", 240, 4), tests("test_right", 200, 3)]
    side_by_side += [tests("test_captured", 160, 3), tests("test_several", 240, 2)]
    # The training compiles what is recorded after it, and leaves it in Inductor's cache.
    return side_by_side, [benchmark("training", 150), benchmark("kernels", 70), benchmark("sampling", 130)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="new folder for the table, numbers and logs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts, on a GPU; the rest is not run")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    folder = (options.out or Path(time.strftime("gpu-check/%Y%m%d-%H%M%S"))).absolute()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--out must be a new folder; {folder} has something in it")
    folder.mkdir(parents=True, exist_ok=True)
    # Once, before several parts want it.
    digits = Path(MnistProblem().root).absolute()
    MNIST.fetch(digits, say=print)
    os.environ["MNIST_ROOT"] = str(digits)
    minutes = options.minutes * (REHEARSAL_PATIENCE if options.device == "cpu" else 1)
    check = Check(folder, options.device, time.monotonic() + 60 * minutes)
    side_by_side, alone = parts(options.device, folder)
    groups: list[tuple[list[list[Part]], int, int | None]] = [
        ([[part] for part in side_by_side], len(side_by_side), THREADS),
        ([alone], 1, None),
    ]
    if options.device == "cpu":
        # On a CPU of few cores two at once are enough, whichever: a rehearsal's numbers mean nothing. The last part
        # samples what the first has trained.
        first, *rest = side_by_side
        *others, last = alone
        groups = [([[first, last], *([part] for part in (*rest, *others))], 2, 1)]
    for group, at_once, threads in groups:
        with ThreadPoolExecutor(at_once) as pool:
            # What a part has raised is raised here by the list; the map alone would keep it.
            list(pool.map(partial(check.run_in_turn, threads=threads), group))
    print((folder / "gpu-check.md").read_text())
    return 0 if all(part["passed"] for part in check.found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
