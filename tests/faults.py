"""Shows that the tests can fail: `python -m tests.faults` writes faults into copies of the code, one at a time.

For each of them the test that is named beside it in fault_list.py must fail, and pass without it. Where the code has
changed so that a fault does not fit any more, this says so at once, and the fault is written anew.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fault_list import FAULTS, Fault
from tests.warm import searched_first

ROOT = Path(__file__).resolve().parent.parent


def written(fault: Fault) -> str:
    """The file with the fault in it; raises ValueError where the text that it replaces is not there once."""
    text = (ROOT / fault.file).read_text()
    if (found := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name!r}: {fault.file} must hold {fault.old!r} once; it does {found} times")
    return text.replace(fault.old, fault.new)


@contextmanager
def copy() -> Iterator[Path]:
    """The checkout as it is, in a folder of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        for name in names:
            if name and (ROOT / name).is_file():  # else it has been deleted
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def run(tests: Sequence[str], where: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Runs the tests in a copy, whose code all processes import, and ends whatever they leave behind."""
    mark = uuid.uuid4().hex
    env = {"MNIST_ROOT": str(ROOT / "data"), "OMP_NUM_THREADS": "1", **os.environ}
    env |= {"PYTHONPATH": searched_first(where), "FAULT": mark, "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-rfE", "-m", "", "-p", "no:cacheprovider", *options, *tests]
    try:
        return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    finally:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"FAULT={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)


def try_out(fault: Fault) -> bool:
    """Whether the fault's test fails with it; says how."""
    started = time.monotonic()
    with copy() as where:
        (where / fault.file).write_text(written(fault))
        ended = run([fault.test], where, "-x")
    caught = ended.returncode == 1  # others mean that no test has run
    seconds = f"{time.monotonic() - started:.0f} s"
    print(f"{'caught' if caught else 'NOT CAUGHT':<11}{seconds:>6}  {fault.name}\n{'':19}{last_words(ended.stdout)[0]}")
    sys.stdout.flush()
    return caught


def last_words(out: str) -> list[str]:
    """What pytest says of each failure, in one line; without a failure its last line."""
    lines = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))] or out.splitlines()[-1:] or [""]
    return [line.replace("tests/", "", 1)[:160] for line in lines]


def pass_without(faults: Sequence[Fault], jobs: int) -> bool:
    """Whether the tests pass where the code is as it is; says which do not."""
    with copy() as where:
        tests = list(dict.fromkeys(fault.test for fault in faults))
        ended = run(tests, where, *(["--numprocesses", str(jobs), "--dist", "worksteal"] if jobs > 1 else []))
    print("Without a fault:", *last_words(ended.stdout), sep="\n  ", flush=True)
    return ended.returncode == 0


def table(faults: Sequence[Fault]) -> str:
    """The faults in Markdown."""
    rows = [f"| {fault.name} | `{fault.file}` | `{fault.test.removeprefix('tests/')}` |" for fault in faults]
    return "\n".join(["| fault | in | test that fails, below `tests/` |", "|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose name or file has one of them")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--slurm", action="store_true", help="those too whose tests start a Slurm, one at a time")
    parser.add_argument("--table", action="store_true", help="print the list and run nothing")
    asked = parser.parse_args()
    chosen = [f for f in FAULTS if not asked.words or any(word in f.name or word in f.file for word in asked.words)]
    if asked.table:
        print(table(chosen))
        return 0
    for fault in chosen:
        written(fault)
    here, there = ([f for f in chosen if f.slurm == slurm] for slurm in (False, True))
    good = not here or pass_without(here, asked.jobs)
    with ThreadPoolExecutor(asked.jobs) as pool:
        caught = dict(zip(here, pool.map(try_out, here), strict=True))
    if asked.slurm and there:
        good &= pass_without(there, 1)
        caught |= {fault: try_out(fault) for fault in there}
    print()
    for fault, is_caught in caught.items():
        print(f"{'caught' if is_caught else 'NOT CAUGHT':<11}{fault.name:<68}{fault.file}")
    print(f"{sum(caught.values())} of {len(caught)} faults are caught.")
    return 0 if good and all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
