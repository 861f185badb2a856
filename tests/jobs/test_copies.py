"""A copied run folder is another run; a moved one, or one with two paths, is the same. Its data may move, too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from commands.train import Resume
from commands.where import Data, Launch
from diffusion.errors import UserError
from jobs.evaluate.plan import Evaluation
from jobs.experiments.table import EXPERIMENTS
from jobs.sample.sample_set import SampleSet
from jobs.storage.run_folder import RunFolder
from jobs.tracking.identity import ensure_id
from jobs.watch.sync import others, segments

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


def test_a_copy_sends_its_own_tracking_and_none_of_its_original(run: RunFolder) -> None:
    def track(run: RunFolder, wandb_id: str) -> Path:
        folder = run.path / "wandb" / f"offline-run-20260101_000000-{wandb_id}"
        folder.mkdir(parents=True)
        (folder / f"run-{wandb_id}.wandb").touch()
        return folder / f"run-{wandb_id}.wandb"

    originals = [track(run, "0000abcd"), track(run, "0000abcd-51073f")]  # the training, and a set of samples
    copy = RunFolder(run.path.with_name("copy"))
    shutil.copytree(run.path, copy.path)
    assert segments(copy) == []
    assert others(copy) == [copy.path / path.relative_to(run.path) for path in originals]
    ensure_id(copy)
    mine = track(copy, copy.read_launch()["wandb_id"])
    assert segments(copy) == [mine]
    assert segments(run) == originals
    (run.path / "launch.json").unlink()  # whose they are is not known any more, so they are sent
    assert segments(run) == originals


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


def test_data_may_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path / "mnist-small" / "a")
    config = EXPERIMENTS["mnist-small"].preset.moved(str(tmp_path / "before"))
    run.create("mnist-small", config, {}, lambda code: code.mkdir())
    asked = Resume(run=str(run.path), where=Launch(cluster="local", device="cpu", dry_run=True))
    evaluation = Evaluation(SampleSet(run.path, "s", None, 1, 1), {})  # type: ignore[arg-type]
    for use in (asked, evaluation.config):
        with pytest.raises(UserError, match=r"--data\.root must say where MNIST lies now.*before is gone"):
            use()
    assert not (tmp_path / "before").exists()
    assert replace(asked, data=Data(root=str(tmp_path / "now")))() == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[: shown.index("\n}") + 2])["data"]["root"] == str(tmp_path / "now")
    assert replace(evaluation, data_root=str(tmp_path / "now")).config().data == config.moved(f"{tmp_path}/now").data
    with pytest.raises(UserError, match=r"data\.root is for data that lie in files; got /now"):
        EXPERIMENTS["1d"].preset.moved("/now")
