"""launch.py, but in its jobs process 1 finds itself on another kind of CPU, as on a node that is not like the first."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

from slurm import local

OTHER = "another kind"


@dataclass(frozen=True)
class OnOtherCpu:
    """A job whose process 1 is told of the other CPU."""

    job: Callable[[], int]

    def __call__(self) -> int:
        if os.environ["RANK"] != "1":
            return self.job()
        with mock.patch("torch.backends.cpu.get_cpu_capability", return_value=OTHER):
            return self.job()


def main() -> int:
    import launch
    from tests.jobs.other_cpu import OnOtherCpu  # as its processes know it

    run = local.run
    with mock.patch.object(local, "run", lambda job, *rest, **more: run(OnOtherCpu(job), *rest, **more)):
        return launch.main()


if __name__ == "__main__":
    sys.exit(main())
