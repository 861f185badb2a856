"""How long a step of a training takes on a CPU: `python -m benchmarks.shards EXPERIMENT PROCESSES SHARDS [STEPS]`.

It prints the median of the steps in milliseconds, in bf16, with the gradient in so many shards (jobs/train/shards.py).
"""

import statistics
import sys
import time
from dataclasses import dataclass, replace

from slurm import local


@dataclass(frozen=True)
class Steps:
    """The job of each process."""

    experiment: str
    processes: int
    shards: int
    steps: int

    def __call__(self) -> int:
        from jobs.experiments.table import EXPERIMENTS
        from jobs.runtime.malloc import keep_freed_memory
        from jobs.runtime.world import start
        from jobs.train.state import Training

        keep_freed_memory()
        preset = EXPERIMENTS[self.experiment].preset
        preset.data.prepare(print)
        world = start(self.processes, "cpu", "bf16")
        training = Training(preset.build(), replace(preset.train, grad_shards=self.shards), world)
        seconds = []
        for _ in range(2 + self.steps):  # two to warm up
            started = time.perf_counter()
            training.update()
            seconds.append(time.perf_counter() - started)
        if world.rank == 0:
            print(f"{1000 * statistics.median(seconds[2:]):.1f} ms")
        world.close()
        return 0


def main() -> None:
    experiment, processes, shards, *steps = sys.argv[1:]
    job = Steps(experiment, int(processes), int(shards), int(steps[0]) if steps else 30)
    sys.exit(job() if job.processes == 1 else local.run(_as_imported(job), job.processes).exit_code)


def _as_imported(job: Steps) -> Steps:
    """Returns the same job of the module that the processes import; here it is called __main__."""
    from benchmarks import shards

    return shards.Steps(job.experiment, job.processes, job.shards, job.steps)


if __name__ == "__main__":
    main()
