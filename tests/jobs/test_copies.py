"""A copied run folder is another run; a moved one, or one with two paths, is the same."""

import shutil
from pathlib import Path

import pytest

from jobs.experiments.table import EXPERIMENTS
from jobs.storage.run_folder import RunFolder
from jobs.tracking.identity import ensure_id

JOBS = {"job_ids": ["17"], "sample_job_ids": ["18", "19"]}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has had jobs."""
    made = RunFolder(tmp_path / "1d" / "a")
    launch = {"wandb_id": "0000abcd", "created": "2026-01-01T00:00:00+00:00", **JOBS}
    made.create("1d", EXPERIMENTS["1d"].preset, launch, lambda code: code.mkdir())
    (made.path / ".tracking.json").write_text('{"step": 20, "timing": 3}')
    return made


def test_a_copy_has_no_jobs_and_an_id_of_its_own(run: RunFolder) -> None:
    copy = RunFolder(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path)
    mine = run.read_launch()
    assert not {"wandb_id", *JOBS} & copy.read_launch().keys()
    ensure_id(copy)
    copy.add_job("job_ids", "20")
    assert copy.read_launch()["job_ids"] == ["20"]
    assert copy.read_launch()["wandb_id"] != mine["wandb_id"]
    assert copy.read_launch()["created"] == mine["created"]
    assert not (copy.path / ".tracking.json").exists()  # the whole curve is sent under the new id
    assert run.read_launch() == mine
    shutil.rmtree(run.path)
    assert copy.read_launch()["job_ids"] == ["20"]


def test_a_moved_run_is_the_same(run: RunFolder) -> None:
    before = run.read_launch()
    moved = RunFolder(run.path.with_name("moved"))
    run.path.rename(moved.path)
    assert moved.read_launch() == before
    moved.add_job("job_ids", "20")
    assert moved.read_launch()["job_ids"] == ["17", "20"]
    ensure_id(moved)
    assert moved.read_launch()["wandb_id"] == before["wandb_id"]
    assert (moved.path / ".tracking.json").exists()
    shutil.copytree(moved.path, run.path)  # what lies at the old path now is the copy
    assert "job_ids" in moved.read_launch()
    assert "job_ids" not in run.read_launch()


def test_a_run_with_two_paths_is_one(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.path.parent)
    assert RunFolder(tmp_path / "link" / "a").read_launch() == run.read_launch()
