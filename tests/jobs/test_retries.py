"""A fault of the machine does not end a run, and a fault of its own does: `--retries`, here, with real processes."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch.distributed import DistNetworkError

from diffusion.errors import UserError
from jobs.files import write_json
from jobs.health.watchdog import Watchdog
from jobs.runtime.job import JobError, MachineError, failure_of, is_outside
from jobs.runtime.signals import SignalWatch
from jobs.storage import faults
from jobs.storage.run_folder import RunFolder, State
from jobs.train.job import TrainJob, submit_runs
from jobs.train.loop import train
from tests.held import AFTER_STEP, held, let_go, start_held
from tests.jobs.parallel import run as in_processes
from tests.launching import NO_FIGURES, TINY, done, finish, launch, start, status, steps_logged, wait_until, workers

COMMAND = ("train", "1d", *TINY, "--name", "a", "--device", "cpu", "--train.checkpoint-every", "50")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_process_is_killed_goes_on_by_itself_to_the_same_bytes(processes: int, tmp_path: Path) -> None:
    where = ("--gpus", processes, "--train.steps", 100)
    calm = tmp_path / "calm"
    calm.mkdir()
    done(*COMMAND, *where, cwd=calm, **NO_FIGURES)
    process = start_held(AFTER_STEP, 60, *COMMAND, *where, "--retries", 1, cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    first = held(tmp_path)
    (victim,) = {*workers(process)} - {process.pid, *([first] if processes == 2 else [])}
    os.kill(victim, signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended
    (fault,) = lines(run)
    assert fault["cause"] == f"process {processes - 1} was ended by SIGKILL"
    assert fault["again"] is True
    assert status(run)["restarts"] == 1
    files = ["metrics.jsonl", *(f"checkpoints/step-00000100/{name}.safetensors" for name in ("model", "ema"))]
    for name in files:
        assert (run / name).read_bytes() == (calm / "runs" / "1d" / "a" / name).read_bytes(), name
    shown = done("status", run, cwd=tmp_path).out
    assert "was ended by SIGKILL" in shown
    assert "tried again" in shown


def test_a_process_that_is_killed_is_named_also_where_nothing_is_tried_again(tmp_path: Path) -> None:
    process = start_held(AFTER_STEP, 60, *COMMAND, "--gpus", 2, "--train.steps", 100, cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    first = held(tmp_path)
    (victim,) = {*workers(process)} - {process.pid, first}
    os.kill(victim, signal.SIGKILL)
    let_go(tmp_path)  # so that it meets the closed connection, whose error comes before the launcher's word
    ended = finish(process)
    assert ended.code == 1
    assert "process 1 was ended by SIGKILL. Continue with: python launch.py resume" in ended.err
    (fault,) = lines(run)
    assert (fault["cause"], fault["again"]) == ("process 1 was ended by SIGKILL", False)
    shown = done("status", run, cwd=tmp_path).out
    assert "runs/1d/a: failed\n" in shown
    assert shown.endswith("process 1 was ended by SIGKILL\n")
    assert "process 0 failed first" not in shown


def test_a_run_is_finished_if_a_process_dies_between_its_last_vote_and_its_end(tmp_path: Path) -> None:
    where = ("--gpus", 2, "--train.steps", 100)
    process = start_held("jobs.train.loop.run_steps", 1, *COMMAND, *where, cwd=tmp_path, times=2)
    run = tmp_path / "runs" / "1d" / "a"
    both = {held(tmp_path, number) for number in range(2)}
    wait_until((run / "checkpoints" / "step-00000100").is_dir)  # a thread writes it
    (other,) = both - {status(run)["pid"]}
    os.kill(other, signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended
    assert "runs/1d/a is finished all the same: " in ended.err
    assert (status(run)["state"], status(run)["step"]) == ("finished", 100)


@pytest.mark.parametrize(("place", "missing"), [("save", True), ("finish", False)])
def test_what_happens_after_the_last_save_fails_no_run_and_starts_none_again(
    place: str, missing: bool, tmp_path: Path
) -> None:
    place = f"jobs.train.recorder.RunRecorder.{place}"
    process = start_held(place, 1, *COMMAND, "--train.steps", 50, "--retries", 1, cwd=tmp_path)
    os.kill(held(tmp_path), signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended
    run = tmp_path / "runs" / "1d" / "a"
    said = status(run)
    assert (said["state"], said["restarts"]) == ("finished", 0)
    assert ("process 0 was ended by SIGKILL" in said["missing"]) == missing
    assert not (run / "faults.jsonl").exists()


def test_wrong_use_is_not_tried_again(tmp_path: Path) -> None:
    diverging = ("--train.lr", "1e30", "--train.warmup-steps", "0", "--train.steps", "200")
    ended = launch(*COMMAND, *diverging, "--retries", 3, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    assert ended.code == 1
    assert (status(run)["state"], status(run)["restarts"]) == ("failed", 0)
    assert not (run / "faults.jsonl").exists()


def test_a_loss_that_is_not_finite_fails_a_run_whose_last_step_is_saved(tmp_path: Path) -> None:
    done(*COMMAND, "--train.steps", 5, cwd=tmp_path, **NO_FIGURES)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    job = TrainJob(run.path, 1, "cpu", retries=1)
    assert job.is_done("killed")
    job.failed(0, "the loss was not finite")
    assert not job.is_done("killed")
    assert run.state() is State.FAILED


def test_ctrl_c_is_obeyed_and_no_fault(tmp_path: Path) -> None:
    process = start(*COMMAND, "--train.steps", 1_000_000, "--retries", 3, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) >= 10)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert status(run)["state"] == "interrupted"
    assert not (run / "faults.jsonl").exists()


def test_a_save_that_fails_after_ctrl_c_is_a_failure_for_good(tmp_path: Path) -> None:
    process = start(*COMMAND, "--train.steps", 1_000_000, "--retries", 3, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) >= 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", run / "checkpoints"], check=True)
    try:
        process.send_signal(signal.SIGINT)
        ended = finish(process, timeout_s=60)
    finally:
        subprocess.run(["umount", run / "checkpoints"], check=True)
    assert ended.code == 1, ended
    assert status(run)["state"] == "failed"
    assert "could not be saved" in status(run)["traceback"]
    assert lines(run)[-1]["again"] is False


def test_the_last_step_is_saved_again_and_again_and_not_made_again(tmp_path: Path) -> None:
    """New starts would come to the same disk within seconds, and use up all tries (`--retries`, here none)."""
    process = start_held(AFTER_STEP, 60, *COMMAND, "--train.steps", 80, cwd=tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    log, said = run / "log.txt", "step 80 could not be saved; trying again in 10 s"
    held(tmp_path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", run / "checkpoints"], check=True)
    try:
        let_go(tmp_path)
        wait_until(lambda: log.exists() and said in log.read_text())
    finally:
        subprocess.run(["umount", run / "checkpoints"], check=True)
    assert finish(process, timeout_s=60).code == 0
    assert (status(run)["state"], status(run)["restarts"]) == ("finished", 0)


def test_a_resume_that_dies_before_it_has_said_anything_is_tried_again(tmp_path: Path) -> None:
    done(*COMMAND, "--train.steps", 50, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    where = ("--cluster", "local", "--device", "cpu", "--retries", 1)  # no other process than the one that trains
    first = "jobs.train.job.keep_freed_memory"  # what a training does first
    process = start_held(first, 1, "resume", run, "--train.steps", 60, *where, cwd=tmp_path)
    os.kill(held(tmp_path), signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended
    (fault,) = lines(run)
    assert (fault["cause"], fault["again"]) == ("process 0 was ended by SIGKILL", True)
    assert (status(run)["state"], status(run)["step"]) == ("finished", 60)


def test_a_budget_below_zero_is_refused(tmp_path: Path) -> None:
    ended = launch(*COMMAND, "--retries", -1, cwd=tmp_path)
    assert (ended.code, ended.err) == (2, "error: --retries must be at least 0; got -1\n")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    write_json(found.status, {"state": State.RUNNING})
    return found


def die(run: RunFolder, cause: str | None = "task 0 was ended: Killed", node: str = "n1", budget: int = 3) -> Any:
    write_json(run.status, {"state": State.RUNNING})
    return faults.judge(run, budget, cause, node)


def fail(run: RunFolder, trace: str, *, outside: bool = False) -> Any:
    run.write_failure(1, trace, outside=outside, node="n1")
    return die(run, cause=None)


def test_the_budget_is_for_tries_without_progress(run: RunFolder) -> None:
    assert [die(run, budget=2).again for _ in range(2)] == [True, True]
    (run.checkpoints / "step-00000100").mkdir()
    assert [die(run, budget=2).again for _ in range(3)] == [True, True, False]
    assert run.state() is State.FAILED
    assert "task 0 was ended: Killed; 2 new starts brought no progress" in run.read_status()["traceback"]
    faults.forgive(run)  # a person continues it
    assert die(run).again


def test_the_same_exception_at_the_same_step_twice_ends_a_run_with_both_tracebacks(run: RunFolder) -> None:
    assert fail(run, "At step 50.\n<at 0x7f1>\nValueError: why").again
    assert fail(run, "At step 60.\n<at 0x7f1>\nValueError: why").again
    assert not fail(run, "At step 50.\n<at 0x8e2>\nValueError: why").again
    assert run.state() is State.FAILED
    trace = run.read_status()["traceback"]
    assert "0x7f1" in trace
    assert "0x8e2" in trace
    assert run.read_status()["failed_rank"] == 1
    assert trace.endswith("ValueError: why")


def test_what_the_machine_does_may_come_twice_at_the_same_step(run: RunFolder) -> None:
    assert [fail(run, "OSError: [Errno 5]", outside=True).again for _ in range(4)] == [True, True, True, False]


def test_whose_fault_an_exception_is() -> None:
    theirs = (OSError(28, "No space left on device"), DistNetworkError("the other end"), MachineError("no GPU"))
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert [is_outside(error) for error in (*theirs, gloo)] == [True] * 4
    of_gpus = (
        *("CUDA error: uncorrectable ECC error encountered", "CUDA error: unspecified launch failure"),
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`",
        *("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDA error: unknown error"),
    )
    assert [is_outside(RuntimeError(words)) for words in of_gpus] == [True] * 6
    ours = (ValueError("connection"), RuntimeError("The size of tensor a (3) must match"), JobError("loss is NaN"))
    assert [is_outside(error) for error in ours] == [False] * 3
    of_code = ("CUDA error: device-side assert triggered", "CUDA error: out of memory", "CUDA out of memory. Tried")
    assert [is_outside(RuntimeError(words)) for words in of_code] == [False] * 3


@dataclass(frozen=True)
class Judged:
    """A training on a node that may lack something; leaves in a file whether another try may help."""

    run: Path
    lacking: str | None

    def __call__(self) -> int:
        sys.stdout = sys.stderr  # stdout is for how the job has ended
        with SignalWatch() as signals, Watchdog(self.run / "hang") as watchdog:
            try:
                with mock.patch("jobs.train.loop.lacking", return_value=self.lacking):
                    return train(RunFolder(self.run), 1, "cpu", signals, watchdog, None)
            except (UserError, JobError) as error:
                write_json(self.run / "given-up.json", failure_of(error, "").for_good)
        return 0


def test_what_another_node_may_have_ends_no_run_that_was_at_work(tmp_path: Path) -> None:
    """Its data, or a GPU that computes in its precision. A new run, whose settings may be wrong, is not tried again."""
    images = tmp_path / "images.npz"
    np.savez(images, np.zeros((40, 8, 8), np.uint8))
    network = ("--model.dim", 8, "--model.dim-mults", 1, "--model.attn-heads", 1)
    settings = ("--data.root", images, *network, "--train.batch-size", 4, "--train.steps", 2, "--name", "a")
    done("train", "images", *settings, cwd=tmp_path, **NO_FIGURES)
    run = RunFolder(tmp_path / "runs" / "images" / "a")
    experiment, config = run.read_experiment()
    run.write_experiment(experiment, replace(config, train=replace(config.train, steps=9)))
    before = run.metrics.read_bytes()
    new = RunFolder(shutil.copytree(run.path, tmp_path / "new"))
    new.timing.unlink()

    def is_given_up(run: RunFolder, lacking: str | None = None) -> bool:
        outcome, said = in_processes(Judged(run.path, lacking), 1)
        assert outcome.exit_code == 0, said
        return bool(json.loads((run.path / "given-up.json").read_text()))

    v100 = "a V100 does not compute in bf16"
    assert (is_given_up(run, v100), is_given_up(new, v100)) == (False, True)
    images.rename(tmp_path / "unmounted")
    assert (is_given_up(run), is_given_up(new)) == (False, True)
    assert run.metrics.read_bytes() == before


def test_an_exception_of_the_code_counts_even_if_another_process_is_killed_because_of_it(run: RunFolder) -> None:
    for again in (True, False):
        run.write_failure(1, "In step 50:\nValueError: why", outside=False, node="n1")
        fault = die(run, cause="task 0 was ended: Aborted", node="n2")
        assert (fault.cause, fault.node, fault.again) == ("ValueError: why", "n1", again)


def test_a_job_whose_run_goes_on_elsewhere_does_not_come_back(run: RunFolder) -> None:
    job = TrainJob(run.path, 1, "cpu", retries=3)
    for where in ({"on_slurm": True, "host": platform.node()}, {"on_slurm": False, "host": "elsewhere"}):
        write_json(run.status, {"state": State.RUNNING, **where})
        assert not job.try_again_after("process 0 was ended by SIGKILL", None, None)
        assert faults.read(run) == []
    assert not job.try_again_after(
        "task 0 was ended: Killed", None, lambda left_out: "17"
    )  # the last one runs here, not on Slurm
    write_json(run.status, {"state": State.RUNNING, "on_slurm": False, "host": platform.node()})
    assert job.try_again_after("process 0 was ended by SIGKILL", None, None)


def test_the_script_of_a_job_waits_an_hour_for_a_full_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process here six minutes; nobody else would queue the job again."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(faults, "judge", full)
    for come_back, seconds in ((lambda left_out: "17", 3670), (None, 370)):
        waited.clear()
        write_json(run.status, {"state": State.RUNNING, "on_slurm": come_back is not None, "host": platform.node()})
        with pytest.raises(OSError, match="No space left"):
            TrainJob(run.path, 1, "cpu", retries=3).try_again_after("was killed", "n1", come_back)
        assert sum(waited) == seconds


def test_the_id_of_a_job_is_written_down_when_the_disk_has_room(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None]
    add_job = RunFolder.add_job

    def add(self: RunFolder, *arguments: Any) -> None:
        if error := full.pop(0):
            raise error
        add_job(self, *arguments)

    monkeypatch.setattr(RunFolder, "add_job", add)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert submit_runs([run.path], lambda: "17") == "17"
    assert run.read_launch()["job_ids"] == ["17"]


def test_a_run_that_has_ended_well_is_not_started_again(run: RunFolder) -> None:
    for state in (State.FINISHED, State.INTERRUPTED, State.CANCELLED, State.FAILED):
        write_json(run.status, {"state": state})
        assert faults.judge(run, 3, "task 1 was ended: Segmentation fault", "n1") is None
        assert run.state() is state
    run.write_failure(0, "Connection closed by peer", outside=True)
    for state in (State.FINISHED, State.INTERRUPTED, State.CANCELLED):
        write_json(run.status, {"state": state})
        assert faults.judge(run, 3, "process 1 was ended by SIGABRT", "n1") is None
        assert run.state() is state


def test_a_node_on_which_a_run_has_died_twice_without_progress_is_left_out(run: RunFolder) -> None:
    assert [list(die(run, node=node, budget=9).left_out) for node in ("n1", "n2", "n1")] == [[], [], ["n1"]]
    (run.checkpoints / "step-00000100").mkdir()
    assert [list(die(run, node=node).left_out) for node in ("n2", "n3", "n2")] == [["n1"], ["n1"], ["n1", "n2"]]


def test_a_job_that_stays_on_its_machine_leaves_out_no_node(run: RunFolder) -> None:
    here = {"state": State.RUNNING, "on_slurm": False, "host": platform.node()}
    for _ in range(2):
        write_json(run.status, here)
        assert TrainJob(run.path, 1, "cpu", retries=9).try_again_after(
            "process 0 was ended by SIGKILL", platform.node(), None
        )
    assert [(fault.node, fault.left_out) for fault in faults.read(run)] == [(platform.node(), [])] * 2
