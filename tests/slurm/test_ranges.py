"""A training asks for a range of GPUs, and gets what is there or what Slurm starts first."""

import re
from pathlib import Path

import pytest
import torch

from commands.train import as_begun
from commands.where import Launch, LaunchTraining, first_to_start
from diffusion.errors import UserError
from jobs.storage.run_folder import RunFolder
from slurm.devcluster import DevCluster
from tests.jobs.parallel import config
from tests.launching import NO_FIGURES, launch, status
from tests.slurm.site import TRAINING


def settled(gpus: str, shards: int | None, device: str = "cpu") -> str | None:
    asked = LaunchTraining(cluster="local", device=device, gpus=gpus)  # type: ignore[arg-type]
    return asked.settled(RunFolder(Path("unused")), config(96, grad_shards=shards)).gpus


@pytest.mark.parametrize(
    ("gpus", "shards", "taken"),
    [("2-8", 8, "8"), ("2-8", 4, "4"), ("3-7", 6, "6"), ("2-3", 12, "3"), ("4", 3, "4"), ("3-3", 3, "3-3")],
)
def test_the_most_that_divide_the_shards_are_taken_here(gpus: str, shards: int | None, taken: str) -> None:
    assert settled(gpus, shards) == taken


def test_no_more_are_taken_than_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert settled("1-8", 8, "auto") == "2"


def test_a_range_without_a_divisor_of_the_shards_is_refused() -> None:
    rule = "--gpus must hold a divisor of train.grad-shards, 1, for the same bytes; got 2-8"
    with pytest.raises(UserError, match=rule):
        settled("2-8", 1)
    with pytest.raises(UserError, match="--gpus must be a number: unused is of a version before ranges; got 2-3"):
        settled("2-3", None)


@pytest.mark.parametrize(("gpus", "asked", "shards"), [("2-8", None, 6), ("3", None, 3), ("2-8", 4, 4)])
def test_of_a_range_the_most_that_divide_the_batch_cut_it(gpus: str, asked: int | None, shards: int) -> None:
    where = LaunchTraining(cluster="local", device="cpu", gpus=gpus)
    assert as_begun(RunFolder(Path("unused")), config(12, grad_shards=asked), where).train.grad_shards == shards


def test_a_range_in_which_none_divides_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be a multiple of the number of GPUs; got train.batch-size=12 on 7 GPUs"):
        as_begun(RunFolder(Path("unused")), config(12), LaunchTraining(cluster="local", device="cpu", gpus="7-8"))


@pytest.mark.parametrize(
    ("gpus", "rule"),
    [
        ("8-2", "--gpus must be a range from fewer to more, such as 2-8; got 8-2"),
        ("0-2", "--gpus must be a range from fewer to more, such as 2-8; got 0-2"),
        ("0", "--gpus must be at least 1; got 0"),
        ("2-", "--gpus must be a number, or a range such as 2-8; got 2-"),
        ("-2", "--gpus must be a number, or a range such as 2-8; got -2"),
        ("two", "--gpus must be a number, or a range such as 2-8; got two"),
    ],
)
def test_what_is_no_range_is_refused(gpus: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        LaunchTraining(gpus=gpus)


def test_only_trainings_take_a_range() -> None:
    with pytest.raises(UserError, match="--gpus must be a number; train and resume alone take a range; got 2-8"):
        Launch(gpus="2-8")


@pytest.mark.parametrize(
    ("starts", "taken"),
    [
        ({8: "2026-11-26T23:10:00", 4: "2026-11-26T22:58:00", 2: "2026-11-26T22:54:30"}, 4),
        ({8: "2026-11-27T00:01:00", 2: "2026-11-26T23:59:00"}, 8),
        ({8: "", 4: "2026-11-28T00:00:00"}, 4),
        ({8: "", 4: "", 2: ""}, 2),
    ],
)
def test_what_starts_first_is_taken_or_more_that_start_a_little_later(starts: dict[int, str], taken: int) -> None:
    assert first_to_start(starts) == taken


@pytest.mark.slurm
def test_a_job_takes_two_tasks_now_instead_of_four_later(tidy: DevCluster, tmp_path: Path) -> None:
    busy = tidy.submit("sleep 600", "--nodes=1", "--exclusive", "--time=60", "--output=/dev/null")
    try:
        tidy.wait_for_job(busy, "RUNNING")
        command = (*TRAINING, "--train.steps", 20, "--gpus", "1-8", "--name", "a", "--wait")
        ended = launch(*command, cwd=tmp_path, **tidy.env, **NO_FIGURES)
        assert ended.code == 0, ended
        said = r"--gpus 1-8, when Slurm would start them: 8 never, 4 at \S+, 2 at \S+, 1 at \S+\. It is asked for 2\."
        assert re.search(said, ended.out), ended.out
        assert "2 tasks on 1 nodes" in ended.out
        run = tmp_path / "runs" / "1d" / "a"
        assert status(run)["state"] == "finished"
        assert RunFolder(run).read_experiment()[1].train.grad_shards == 8
    finally:
        tidy.run("scancel", busy)
