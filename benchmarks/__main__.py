"""All benchmarks but one, or some: `python -m benchmarks [NAME ...]` prints a table and writes a JSON file.

Three of them, sampling, digits and large-sets, sample the models that `make demo` trains; submission needs a Slurm.
One, quality, trains the library's recipe for most of an hour and runs only where it is named.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import commands, quality, sampling, training
from benchmarks.comparison import Row, machine, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each alternative")
    parser.add_argument("--steps", type=int, default=3, help="training steps in a round")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with the runs of `make demo`")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where to write the numbers")
    options = parser.parse_args()
    runs, rounds = options.runs, options.rounds
    benchmarks: dict[str, Callable[[], Iterator[Row]]] = {
        "training": lambda: training.rows(rounds, options.steps),
        "sampling": lambda: sampling.rows(rounds, runs / "mnist-small" / "demo"),
        "digits": lambda: commands.digits(runs / "mnist-small" / "demo"),
        "large-sets": lambda: commands.large_sets(runs / "1d" / "demo"),
        "overhead": lambda: commands.overhead(rounds),
        "scaling": lambda: commands.scaling(rounds),
        "start-up": lambda: commands.start_up(rounds),
        "submission": lambda: commands.submission(rounds),
        "quality": lambda: quality.rows(runs / "library"),
    }
    which = options.which or [name for name in benchmarks if name != "quality"]
    if not options.which and not shutil.which("sbatch"):
        which.remove("submission")
    if unknown := set(which) - set(benchmarks):
        parser.error(f"benchmarks are {', '.join(benchmarks)}; got {', '.join(unknown)}")
    if {"sampling", "digits", "large-sets"} & set(which) and not runs.is_dir():
        parser.error(f"sampling, digits and large-sets need the runs of `make demo`; there is no {runs}")
    rows = [row for name in which for row in benchmarks[name]()]
    print(table(rows))
    found = {"machine": machine(), "rounds": rounds, "rows": [row.as_json() for row in rows]}
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
