"""Runs a job that a launcher has planned for a GPU: `python -m tests.jobs.for_gpu train|sample|evaluate RUN`."""

import sys
from pathlib import Path

from jobs.evaluate import plan
from jobs.evaluate.job import EvaluateJob
from jobs.sample import sample_set
from jobs.sample.job import SampleJob
from jobs.storage.run_folder import RunFolder
from jobs.train.job import TrainJob


def main(kind: str, run: Path) -> int:
    if kind == "train":
        return TrainJob(run, 1, "cuda")()
    name = next((run / "samples").iterdir()).name
    if kind == "sample":
        return SampleJob(sample_set.read(RunFolder(run), name), (0,), 1, "cuda", merge=True)()
    return EvaluateJob(plan.plan(RunFolder(run), name), (0, 1), "cuda", merge=True)()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
