"""Several processes are one: the same examples, the same decisions, and none is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import accelerate.state
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but missing in its __all__

from jobs.runtime import world
from jobs.runtime.job import MachineError
from jobs.storage import checkpoints
from slurm import local
from tests.jobs.parallel import CloseJob, ExamplesJob, FailJob, LastJob, LateJob, LoneJob, PausedJob, SkipJob, run
from tests.launching import NO_FIGURES, TINY, finish, start, status, steps_logged, wait_until, workers

pytestmark = pytest.mark.processes  # which tests/jobs/parallel.py starts


def test_any_number_of_processes_sees_the_same_bytes(tmp_path: Path) -> None:
    seen = []
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        outcome, err = run(ExamplesJob(folder, processes), processes)
        assert outcome.exit_code == 0, err
        seen.append(np.concatenate([np.load(folder / f"{rank}.npy") for rank in range(processes)], axis=2))
    assert seen[0].shape == (3, 3, 520)
    assert seen[0].tobytes() == seen[1].tobytes() == seen[2].tobytes()
    assert len(np.unique(seen[0][:, 2])) == 3 * 520  # no noise is drawn twice


def test_processes_meet_at_a_port_that_nothing_else_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as another:
        monkeypatch.setenv("MASTER_PORT", str(another.getsockname()[1]))
        outcome, err = run(ExamplesJob(tmp_path, 2), 2)
    assert outcome.exit_code == 0, err
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_that_comes_late_still_finds_the_port(tmp_path: Path) -> None:
    """Also with a backend that waits for nobody, as NCCL: torch's fake one."""
    outcome, err = run(LateJob(tmp_path), 2)
    assert outcome.exit_code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_at_the_end_all_wait_for_the_one_that_draws_figures(tmp_path: Path) -> None:
    outcome, err = run(CloseJob(tmp_path), 2)
    assert outcome.exit_code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"comes", "leaves"}


def test_the_first_process_leaves_when_the_others_have_no_more_to_ask_it(tmp_path: Path) -> None:
    """torch would print a stack trace of each that asks it in vain."""
    outcome, err = run(LastJob(tmp_path), 2)
    assert outcome.exit_code == 0, err


def test_a_job_that_was_stopped_as_a_whole_is_not_ended_by_its_collectives(tmp_path: Path) -> None:
    """Their clock goes on while it stands still; the watchdog sees what hangs."""
    outcome, err = run(PausedJob(tmp_path), 2)
    assert outcome.exit_code == 0, err


def test_a_process_alone_leaves_no_group_behind(tmp_path: Path) -> None:
    """NCCL would complain about it in each log."""
    outcome, err = run(LoneJob(tmp_path), 1)
    assert outcome.exit_code == 0, err


def test_two_rtx_40_with_an_old_driver_train_without_their_direct_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate refuses them else, also to use one."""
    monkeypatch.setattr(world, "own_device", lambda kind: torch.device("cuda", 0))
    monkeypatch.setattr(world, "set_numerics", lambda precision: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["RTX 3090", "RTX 4090"].__getitem__)
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: torch.device("cuda", 0)))
    for module in (accelerate.state, world):
        monkeypatch.setattr(module, "check_cuda_p2p_ib_support", lambda: False)
    for variable in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "ACCELERATE_BYPASS_DEVICE_MAP"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    PartialState._reset_state()
    try:
        assert world.start(1, "cuda", "fp32").size == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert os.environ["NCCL_P2P_DISABLE"] == os.environ["NCCL_IB_DISABLE"] == "1"


def test_a_process_that_finds_no_others_blames_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a new start may help, also if it happens twice."""
    monkeypatch.setattr(world, "MEETING", timedelta(seconds=0.1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="in vain for process 0"):
        world._meet(tmp_path / "port", "gloo")


def test_a_process_that_never_comes_is_waited_for_as_long_as_a_meeting_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gloo itself it would be as long as a collective may take."""
    monkeypatch.setattr(world, "MEETING", timedelta(seconds=0.1))
    monkeypatch.setattr(world, "COLLECTIVE", timedelta(seconds=1))
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    (tmp_path / "port").write_text(str(store.port))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="met-0"):
        world._meet(tmp_path / "port", "gloo")


@pytest.mark.parametrize(("processes", "grad_shards"), [(1, None), (2, None), (2, 8)])
def test_a_step_that_is_not_finite_is_skipped_by_all(processes: int, grad_shards: int | None, tmp_path: Path) -> None:
    outcome, err = run(SkipJob(tmp_path, processes, grad_shards), processes)
    assert outcome.exit_code == 0, err
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(other == seen[0] for other in seen)
    steps = seen[0]
    assert [step["skipped"] for step in steps] == [False, False, True, False, False]
    assert steps[2]["weights"] == steps[1]["weights"]
    assert steps[2]["averages"] == steps[1]["averages"]
    assert steps[3]["weights"] != steps[2]["weights"]
    assert np.isfinite(steps[4]["weights"] + steps[4]["averages"]).all()
    assert [step["stop"] for step in steps] == [0, 0, 0, 1, 0]  # what one has asked for, at once and only then


@pytest.mark.parametrize(("processes", "grad_shards"), [(1, 4), (2, None), (2, 8), (3, 8)])
def test_a_captured_step_is_the_step(processes: int, grad_shards: int | None, tmp_path: Path) -> None:
    """On several processes the graphs lie around the exchange. A CPU has none, but can record and repeat them.

    Two of the three processes have two subtrees of the eight shards each.
    """
    seen = []
    for captured in (False, True):
        outcome, err = run(SkipJob(tmp_path, processes, grad_shards, captured), processes)
        assert outcome.exit_code == 0, err
        seen.append([(tmp_path / f"{rank}.json").read_text() for rank in range(processes)])
    assert seen[0] == seen[1]


def test_a_failing_process_ends_the_others(tmp_path: Path) -> None:
    outcome, err = run(FailJob(tmp_path), 3)
    assert (outcome.exit_code, outcome.failed_rank, outcome.signal) == (1, 1, None)
    assert "broken on purpose" in err
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(3) if (tmp_path / str(rank)).exists()]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_that_die_together_are_each_seen() -> None:
    children = [subprocess.Popen(["sh", "-c", "kill -9 $$"], stdin=subprocess.PIPE) for _ in range(2)]
    for child in children:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    outcome = local._wait(children)
    assert (outcome.exit_code, outcome.signal) == (1, "SIGKILL")


def test_processes_that_die_at_once_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = partial(len, bytes(1_000_000))  # more than fits into a pipe
    assert local.run(job, 2).exit_code == 1


def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("slurm", "jobs", "queue", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    assert local.run(int, 2).exit_code == 0


def test_processes_that_believe_themselves_alone_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="this job has 2 processes, but process 0 finds 1"):
        world.start(2, "cpu", "fp32")


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    endless = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a", "--device", "cpu", "--gpus", "2")
    process = start(*endless, cwd=tmp_path, **NO_FIGURES)
    folder = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(folder) > 10)
    (other,) = {*workers(process)} - {process.pid, status(folder)["pid"]}
    os.kill(other, signal.SIGTERM)
    assert finish(process, timeout_s=60).code == 130
    assert status(folder)["state"] == "cancelled"
    assert checkpoints.steps(folder / "checkpoints")[0] == status(folder)["step"] == steps_logged(folder)
