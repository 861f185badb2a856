"""Tracking online: what a server gets while a run goes on, and what the run does that its page asks for."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.followers.start import follow_training, machine_of
from jobs.storage.ownership import Ownership
from jobs.storage.run_folder import RunFolder
from jobs.tracking.identity import Machine
from tests.held import AFTER_STEP, start_held
from tests.jobs.test_sync import Keeping, server  # noqa: F401  # a fixture
from tests.launching import NO_FIGURES, TINY, done, finish, status, wait_until

TRAIN = ("train", "1d", *TINY, "--name", "a", "--train.steps", "20")


def test_each_node_of_a_job_shows_how_busy_it_is(
    server: type[Keeping],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done(*TRAIN, cwd=tmp_path, **NO_FIGURES)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.5")
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.5")
    owner, said = Ownership.take(run.path), list[str]()
    here = Machine(pid=os.getpid(), tree=False, gpus=[], node="n1", nodes=2, is_first=True)
    there = replace(here, node="n2", is_first=False)
    followers = [follow_training(run, owner, machine, said.append) for machine in (there, here)]

    def nodes() -> set[str]:
        names = {name.partition("/l:") for event in server.events for name in event}
        return {node for quantity, _, node in names if quantity == "system.proc.memory.rssMB"}

    wait_until(lambda: nodes() == {"n1", "n2"})
    for follower in followers:
        follower.close(wait=True)
    assert said == []
    (rows,) = server.rows.values()
    assert {row["step"] for row in rows.values() if "loss/train" in row} == set(range(1, 21))


def test_stop_on_the_page_cancels_the_run(server: type[Keeping], tmp_path: Path) -> None:  # noqa: F811
    server.is_stopped = True
    run, command = tmp_path / "runs" / "1d" / "a", ("train", "1d", *TINY, "--name", "a", "--train.steps", "1000000")
    command = (*command, "--train.log-every", "100")
    ended = finish(start_held(AFTER_STEP, 100, *command, cwd=tmp_path, WANDB_MODE=""))
    assert ended.code == 130
    assert status(run)["state"] == "cancelled"
    assert "Stop was pressed on wandb's page: the run is cancelled." in ended.out


def test_the_first_process_of_each_node_knows_what_of_it_belongs_to_the_job() -> None:
    processes: list[tuple[str, str | None]] = [("n1", "a"), ("n2", "b"), ("n1", "c"), ("n2", "d"), ("n3", "e")]
    found: list[Any] = [machine_of(processes, rank) for rank in range(5)]
    assert [machine and (machine.node, machine.gpus, machine.is_first, machine.tree) for machine in found] == [
        ("n1", ["a", "c"], True, True),
        ("n2", ["b", "d"], False, True),
        None,
        None,
        ("n3", ["e"], False, False),
    ]
    assert [machine.pid for machine in found if machine] == [os.getppid(), os.getppid(), os.getpid()]
    assert found[0].nodes == 3
