"""What the job after an array does where it can submit nothing, as on compute nodes without sbatch, or not all."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from jobs.sample import sample_set
from jobs.sample.job import SampleJob, SampleMergeJob
from jobs.storage.run_folder import RunFolder
from slurm.place import AfterArray, OnSlurm
from slurm.profile import Profile
from slurm.task import Requeue
from tests.launching import NO_FIGURES, TINY, done


@dataclass(frozen=True)
class Lost:
    """What follows an array of which nothing has been done."""

    def __call__(self, requeue: Requeue | None = None) -> int:
        return 1

    def failed(self, rank: int, trace: str) -> None:
        raise AssertionError(trace)

    def submitted(self, submit: Callable[[], str]) -> str:
        return submit()

    def lost(self, jobs: Sequence[Any]) -> Sequence[Any]:
        return jobs


@pytest.mark.parametrize(("max_jobs", "elements"), [(None, 5), (4, 2), (2, 0)])
def test_no_more_than_the_site_allows_is_submitted_again_and_the_rest_later(
    max_jobs: int | None, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This job itself, and the one that is to follow, are in the queue as well."""
    for tool, says in {"sbatch": "echo 17", "scontrol": "", "squeue": ""}.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "16_0_log.out").touch()  # it was not cancelled
    place = OnSlurm(1, Profile(max_jobs=max_jobs), True, "a", tmp_path, tmp_path)
    jobs = [Lost() for _ in range(5)]
    last = AfterArray(place, jobs, ["16"], lambda jobs, submit: submit(), None, Lost(), rounds=2)
    assert last(Requeue(600)) == (0 if elements else 1)
    assert len(list(tmp_path.glob("17_?_submitted.pkl"))) == elements
    if elements:
        follows: Any = DelayedSubmission.load(tmp_path / "17_submitted.pkl")
        assert len(follows.function.work.jobs) == 5
        assert follows.function.work.rounds == 1


@pytest.mark.parametrize("on_gpus", [False, True])
def test_it_draws_what_is_missing_itself_if_it_needs_no_gpu_for_that(
    on_gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    done("sample", "1d/a", "--num-samples", "150000", "--steps", "3", "--name", "s", cwd=tmp_path)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    asked = sample_set.read(run, "s")
    before = {path.name: path.read_bytes() for path in asked.folder.iterdir()}
    asked.shard_path(1).unlink()
    (asked.folder / "samples.npz").unlink()
    asked.write_manifest()
    for name, value in {"PATH": "", "WANDB_MODE": "disabled", "RANK": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    (run.path / "slurm").mkdir()
    (run.path / "slurm" / "17_0_log.out").touch()
    jobs = [SampleJob(asked, (shard,), 1, "cpu", merge=False) for shard in range(asked.num_shards)]
    place = OnSlurm(1, Profile(), on_gpus, "a", run.path / "slurm", run.code)
    last = AfterArray(place, jobs, ["17"], lambda jobs, submit: submit(), 1, SampleMergeJob(asked), rounds=1)
    code = last(Requeue(600))
    printed = capsys.readouterr().out
    assert "1 of 3 shards are missing." in printed
    if on_gpus:
        assert code == 1
        assert printed.endswith("Something is still missing: the command that submitted this does the rest.\n")
        assert asked.missing() == [1]
    else:
        assert code == 0
        assert {path.name: path.read_bytes() for path in asked.folder.iterdir()} == before
