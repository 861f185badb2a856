"""All benchmarks but three, or some: `python -m benchmarks [NAME ...]` prints a table and writes a JSON file.

Three of them, sampling, digits and large-sets, sample the models that `make demo` trains; submission needs a Slurm.
Three run only where they are named: quality trains the library's recipe for most of an hour, survival trains `mnist`,
which is sized for GPUs, with an interruption, and kernels says what a GPU does in one of its steps.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import commands, kernels, quality, sampling, survival, training
from benchmarks.comparison import Row, machine, rehearse, table

NAMED = ("quality", "survival", "kernels")
OF_CPUS = ("overhead", "quality")
"""The clock of one, and the recipe's layers and hour of the other, are those of a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each alternative")
    parser.add_argument("--steps", type=int, help="training steps in a round (default: 3; on a GPU 32)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with the runs of `make demo`")
    parser.add_argument("--sampled", default="mnist-small/demo", help="run of digits that is sampled")
    parser.add_argument("--small", action="store_true", help="tiny networks: a rehearsal whose numbers mean nothing")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where to write the numbers")
    options = parser.parse_args()

    # Here, because torch comes with the second, and --help needs none.
    from diffusion.errors import UserError
    from jobs.runtime.numerics import resolve_device

    try:
        device = resolve_device(options.device, None)
    except UserError as error:
        parser.error(str(error))
    if options.small and device == "cpu":
        rehearse()
    runs, rounds, steps, small = options.runs, options.rounds, options.steps, options.small
    sampled = runs / options.sampled
    benchmarks: dict[str, Callable[[], Iterator[Row]]] = {
        "training": lambda: training.rows(rounds, steps, device, small),
        "compiled": lambda: training.compiled(rounds, steps, device, small),
        "sampling": lambda: sampling.rows(rounds, sampled, device, small),
        "digits": lambda: commands.digits(sampled, device),
        "large-sets": lambda: commands.large_sets(runs / "1d" / "demo", device),
        "overhead": lambda: commands.overhead(rounds),
        "scaling": lambda: commands.scaling(rounds, device),
        "start-up": lambda: commands.start_up(rounds),
        "submission": lambda: commands.submission(rounds),
        "kernels": lambda: kernels.rows(device, small),
        "survival": lambda: survival.rows(runs, device, small),
        "quality": lambda: quality.rows(runs / "library"),
    }
    left_out = {*NAMED, *(OF_CPUS if device == "cuda" else ()), *(() if shutil.which("sbatch") else ("submission",))}
    which = options.which or [name for name in benchmarks if name not in left_out]
    if unknown := set(which) - set(benchmarks):
        parser.error(f"benchmarks are {', '.join(benchmarks)}; got {', '.join(unknown)}")
    # survival makes the folder, and trains a run in it.
    if {"sampling", "digits", "large-sets"} & set(which) and "survival" not in which and not runs.is_dir():
        parser.error(f"sampling, digits and large-sets need the runs of `make demo`; there is no {runs}")
    rows: list[Row] = []
    for row in (row for name in which for row in benchmarks[name]()):
        rows.append(row)
        found = {"machine": machine(), "rounds": rounds, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")  # as it grows: what follows may fail
    print(table(rows))


if __name__ == "__main__":
    main()
