"""What the job after an array does where it can submit nothing, as on compute nodes without sbatch."""

import os
from pathlib import Path

import pytest

from jobs.sample import sample_set
from jobs.sample.job import SampleJob, SampleMergeJob
from jobs.storage.run_folder import RunFolder
from slurm.place import AfterArray, OnSlurm
from slurm.profile import Profile
from slurm.task import Requeue
from tests.launching import NO_FIGURES, TINY, done


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
        assert printed.endswith("Run the same command again.\n")
        assert asked.missing() == [1]
    else:
        assert code == 0
        assert {path.name: path.read_bytes() for path in asked.folder.iterdir()} == before
