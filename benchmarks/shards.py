"""How long a training step takes on a CPU: `python -m benchmarks.shards EXPERIMENT PROCESSES SHARDS [STEPS] [compile]`.

It prints the median of the steps in milliseconds, of the clock and of the first process's CPU, in bf16, with the
gradient in so many shards (jobs/train/shards.py).
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
    compile: bool

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
        if self.compile:
            training.compile()
        clocks = time.perf_counter, time.process_time
        seconds = []
        for _ in range(2 + self.steps):  # two to warm up
            started = [clock() for clock in clocks]
            training.update()
            seconds.append([clock() - at for clock, at in zip(clocks, started, strict=True)])
        if world.rank == 0:
            wall, cpu = (1000 * statistics.median(column) for column in zip(*seconds[2:], strict=True))
            print(f"{wall:.1f} ms, of CPU {cpu:.1f} ms")
        world.close()
        return 0


def main() -> None:
    experiment, processes, shards, *more = sys.argv[1:]
    steps = [int(word) for word in more if word != "compile"] or [30]
    job = Steps(experiment, int(processes), int(shards), steps[0], "compile" in more)
    sys.exit(job() if job.processes == 1 else local.run(_as_imported(job), job.processes).exit_code)


def _as_imported(job: Steps) -> Steps:
    """Returns the same job of the module that the processes import; here it is called __main__."""
    from benchmarks import shards

    return shards.Steps(job.experiment, job.processes, job.shards, job.steps, job.compile)


if __name__ == "__main__":
    main()
