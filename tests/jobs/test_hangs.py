"""A process that makes no progress is ended within its patience, with the stacks of all, and a slow one is not."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.experiments.table import EXPERIMENTS
from jobs.health import gpu_errors, gpu_test, watcher
from jobs.health.gpu_errors import IGNORE, Question
from jobs.health.watchdog import HEADER, VARIABLE, Watchdog
from jobs.runtime import world
from jobs.runtime.signals import SignalWatch
from jobs.storage import faults
from jobs.storage.run_folder import RunFolder
from jobs.train.loop import run_steps
from jobs.train.recorder import NoRecorder
from jobs.train.state import Training
from tests.launching import (
    NO_FIGURES,
    ROOT,
    TINY,
    done,
    finish,
    slowed,
    start,
    status,
    steps_logged,
    wait_until,
    workers,
)

COMMAND = ("train", "1d", *TINY, "--name", "a", "--device", "cpu", "--train.checkpoint-every", "50")
HASTY = {VARIABLE: "3", **NO_FIGURES}
NO_PROGRESS = r"no progress for \d+ s"
"""Who looks on may itself be late by a second."""


def test_all_processes_leave_their_stacks_and_the_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    where = ("--gpus", 2, "--train.steps", 150)
    calm = tmp_path / "calm"
    calm.mkdir()
    done(*COMMAND, *where, cwd=calm, **NO_FIGURES)
    slowly = slowed("jobs.train.loop", "logged", 0.05)
    process = start(*COMMAND, *where, "--retries", 1, cwd=tmp_path, **HASTY, **slowly)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) >= 60)
    (victim,) = {*workers(process)} - {process.pid, status(run)["pid"]}
    os.kill(victim, signal.SIGSTOP)
    ended = finish(process)
    assert ended.code == 0, ended
    (fault,) = faults.read(RunFolder(run))
    assert fault.hang is not None
    assert fault.cause.startswith("hung: process 1 on ")
    assert fault.cause.endswith(", stopped")
    stacks = [(run / fault.hang / f"process-{rank}.txt").read_text() for rank in range(2)]
    for text in stacks:
        assert "in run_steps" in text
    for name in ["metrics.jsonl", *(f"checkpoints/step-00000150/{name}.safetensors" for name in ("model", "ema"))]:
        assert (run / name).read_bytes() == (calm / "runs" / "1d" / "a" / name).read_bytes(), name
    assert fault.hang in done("status", run, cwd=tmp_path).out


def test_a_process_that_hangs_alone_is_ended_and_says_how_to_continue(tmp_path: Path) -> None:
    process = start(*COMMAND, "--train.steps", 1_000_000, cwd=tmp_path, **HASTY)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) >= 60)
    process.send_signal(signal.SIGSTOP)
    ended = finish(process)
    assert ended.code == -signal.SIGKILL
    assert re.search(rf"{NO_PROGRESS} in step", ended.err)
    assert ended.err.endswith("Continue with: python launch.py resume runs/1d/a\n")
    shown = done("status", run, cwd=tmp_path).out
    assert "failed (hung: process 0 on " in shown
    done("resume", run, "--train.steps", 1_000_001, "--dry-run", cwd=tmp_path)


def test_two_processes_with_one_number_leave_their_stacks_in_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where the first process always has the same."""
    monkeypatch.delenv("MASTER_PORT_FILE", raising=False)
    assert watcher.attempt(1) != watcher.attempt(1)


def test_a_sampling_that_hangs_is_ended_and_says_how_to_continue(tmp_path: Path) -> None:
    done(*COMMAND, "--train.steps", 50, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    sampling = ("sample", run, "--device", "cpu", "--name", "s", "--sampler", "ddpm", "--num-samples")
    process = start(*sampling, 10_000_000, cwd=tmp_path, **{VARIABLE: "0.4"})
    wait_until(lambda: len([*run.glob("samples/s/shard-*")]) > 0)
    process.send_signal(signal.SIGSTOP)
    ended = finish(process)
    assert ended.code == -signal.SIGKILL
    assert re.search(rf"{NO_PROGRESS} in evaluation", ended.err)
    assert ended.err.endswith("The same command draws what is missing.\n")
    assert len([*run.glob("samples/s/hang/*/process-0.txt")]) == 1


def test_a_pause_within_the_patience_and_a_job_that_is_paused_as_a_whole_go_on(tmp_path: Path) -> None:
    process = start(*COMMAND, "--train.steps", 1_000_000, cwd=tmp_path, **{**HASTY, VARIABLE: "6"})
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) >= 60)
    (watcher,) = children(process.pid, "watcher.py")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # seen by the one that looks on
    # As a laptop that sleeps: both stand still, for longer than the patience.
    os.kill(watcher, signal.SIGSTOP)
    time.sleep(6)
    os.kill(watcher, signal.SIGCONT)
    time.sleep(1)  # it looks first: else a step would already have been done
    process.send_signal(signal.SIGCONT)
    lines = steps_logged(run)
    wait_until(lambda: steps_logged(run) >= lines + 100)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert status(run)["state"] == "interrupted"
    assert not (run / "hang").exists()


def children(pid: int, word: str) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if word in Path(f"/proc/{child}/cmdline").read_text()]


HOLDS_THE_INTERPRETER = """
import ctypes, sys
from pathlib import Path
from jobs.health.watchdog import Watchdog
with Watchdog(Path(sys.argv[1])) as watchdog:
    watchdog.step(7)
    ctypes.PyDLL(None).sleep(1000)
"""


def test_a_call_that_lets_no_other_python_thread_run_is_noticed_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS_THE_INTERPRETER, str(tmp_path)]
    environment = {**os.environ, VARIABLE: "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    (stacks,) = tmp_path.glob("*/process-0.txt")
    assert re.search(rf"{NO_PROGRESS} in step 8", stacks.read_text())
    assert 'File "<string>", line 7 in <module>' in stacks.read_text()


AT_A_TERMINAL = """
import os, pdb, signal, sys, threading  # pdb, so that the first question to it takes no second
from pathlib import Path
from jobs.health.watchdog import Watchdog
with Watchdog(Path(sys.argv[1])) as watchdog:
    watchdog.step(7)
    print("begins", flush=True)
    {stands_still}
    watchdog.step(8)
    print("goes on", flush=True)
"""


@pytest.mark.parametrize("stands_still", ["os.kill(os.getpid(), signal.SIGSTOP)", "breakpoint()"])
def test_a_person_at_a_terminal_may_stop_it_or_look_into_it_for_longer(stands_still: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", AT_A_TERMINAL.format(stands_still=stands_still), str(tmp_path / "hang")]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, VARIABLE: "1"}, stdin=theirs, stdout=subprocess.PIPE, text=True
    )
    with os.fdopen(ours, "w") as terminal, process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        terminal.write("continue\n")
        terminal.flush()
        assert "goes on" in process.stdout.read()
    assert process.returncode == 0
    assert not (tmp_path / "hang").exists()


def test_a_gpu_that_computes_one_wrong_number_is_found() -> None:
    def wrong(left: Tensor, right: Tensor) -> Tensor:
        product = left @ right
        product[3, 5] += 1
        return product

    cpu = torch.device("cpu")
    assert gpu_test.fault_of(cpu, seconds=0, size=64) is None
    fault = gpu_test.fault_of(cpu, seconds=0, size=64, product=wrong)
    assert fault == "cpu computes wrongly: 1 of 4096 numbers of a product are not what they must be"


SMI = """#!/bin/sh
# Answers as nvidia-smi does for one GPU: it refuses a question with a name that its driver does not know.
echo >> "$0.asked"
fields=${{2#--query-gpu=}}
[ "$1 $3" = "--id=GPU-1f --format=csv,noheader,nounits" ] || exit 6
{odd}
line= IFS=,
for field in $fields; do
  case $field in
    index) value=3 ;;
    ecc.errors.uncorrected.volatile.total) value={ecc} ;;
    retired_pages.pending) value={pages} ;;
    remapped_rows.failure) value={rows} ;;
    gpu_recovery_action) value={action} ;;
    *) value= ;;
  esac
  [ -n "$value" ] || {{ echo "Field \\"$field\\" is not a valid field to query."; exit 2; }}
  line="$line, $value"
done
echo "${{line#, }}"
"""
HEALTHY = {"ecc": "0", "pages": "'[N/A]'", "rows": "0", "action": "None", "odd": ""}


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        ({}, None),
        ({"ecc": "2"}, "has had 2 uncorrected memory errors since"),
        ({"pages": "Yes", "rows": "''"}, "goes on using a bad page"),  # an older driver
        ({"action": "Reset"}, "has a fault that lasts until it gets a reset (gpu_recovery_action is Reset)"),
        ({"action": "'Node Reboot'"}, "has a fault that lasts until it gets a node reboot"),
        ({"action": "'Drain and Reset'"}, None),
        ({"action": "''", "ecc": "1"}, "has had 1 uncorrected memory errors since"),  # a driver of 2023
        ({"pages": "No", "rows": "Yes"}, "could not replace a bad row of its memory (remapped_rows.failure is Yes)"),
        ({"ecc": "'[Not Supported]'", "rows": "'[Unknown Error]'"}, None),
        ({"ecc": "2", "odd": "echo 'No devices were found'; exit 9"}, None),
        ({"ecc": "2", "odd": "printf '\\377, a, b, c, d'; exit 0"}, None),
        ({"ecc": "2", "odd": "exec sleep 1000"}, None),
    ],
)
def test_a_gpu_whose_driver_knows_of_errors_is_named(
    answers: dict[str, str], fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(**{**HEALTHY, **answers}))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if "sleep" not in answers.get("odd", ""):
        monkeypatch.setattr(gpu_errors, "PATIENCE_S", 60.0)
    said = Question("GPU-1f").answer()  # one that sleeps is not waited for: no test may last so long
    assert said is None if fault is None else said is not None and said.startswith("GPU 3 (GPU-1f) ") and fault in said
    assert said is None or said.endswith("; IGNORE_GPU_ERRORS=1 uses it all the same")
    if "sleep" in answers.get("odd", ""):
        asked = tmp_path / "nvidia-smi.asked"
        assert not asked.exists() or asked.read_text() in ("\n", "\n\n")  # one that hangs is not asked again
    monkeypatch.setenv(IGNORE, "1")
    assert Question("GPU-1f").answer() is None


@pytest.mark.parametrize("script", [None, "no script"])
def test_a_machine_without_nvidia_smi_or_with_a_broken_one_has_no_fault(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Question("GPU-1f").answer() is None


@pytest.mark.parametrize(
    ("heads", "cause", "node"),
    [
        (["0 on n1: no progress for 61 s in step 9", "1 on n2: no progress for 60 s in step 8"], "process 1", "n2"),
        (["0 on n1: no progress for 61 s in step 8, stopped", "1 on n2: no progress for 60 s in step 8"], "0 on", "n1"),
        (
            [
                "0 on n1: no progress for 3 s in step 8, waiting for a disk or a network",
                "1 on n2: no progress for 3 s in step 8, stopped",
            ],
            "process 1",
            "n2",
        ),
        (
            [
                "0 on n1: no progress for 3 s in step 8",
                "1 on n2: no progress for 3 s in step 9, waiting for a disk or a network",
            ],
            "process 1",
            "n2",
        ),
        (["0 on n1: no progress for 9 s in the last save", "1 on n2: no progress for 9 s in the end"], "save", "n1"),
    ],
)
def test_who_is_behind(heads: list[str], cause: str, node: str, tmp_path: Path) -> None:
    for rank, head in enumerate(heads):
        (tmp_path / f"process-{rank}.txt").write_text(f"process {head}\n\nstacks\n")
    described = faults.describe_hang(tmp_path)
    assert cause in described[0]
    assert described[1] == node


SLOW = """
import sys, time
from pathlib import Path
from jobs.health.watchdog import Watchdog
with Watchdog(Path(sys.argv[1])) as watchdog:
    watchdog.phase("the first step", 15)
    for step in range(1, 4):
        time.sleep(1.5)
        watchdog.step(step)
"""


def test_steps_that_are_slow_from_the_first_one_on_are_no_hang(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, VARIABLE: "0.5"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.processes  # the one that looks on
def test_a_held_out_loss_may_take_longer_than_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of hundreds of examples, and a batch may be of four."""
    preset = EXPERIMENTS["1d"].preset
    settings = replace(preset.train, steps=3, held_out_every=2)
    seen = []

    def loss() -> float:
        assert watchdog._memory is not None
        seen.append((watchdog.doing, HEADER.unpack_from(watchdog._memory)[1]))
        return 0.0

    with Watchdog(tmp_path) as watchdog:
        training = Training(replace(preset, train=settings).build(), settings, world.start(1, "cpu", "fp32"))
        monkeypatch.setattr(training.held_out, "loss", loss)
        run_steps(training, NoRecorder(), SignalWatch(), watchdog, 2)
        assert [*seen, watchdog.doing] == [("the held-out loss", 15 * 60), "step 3"]


WAITS_FOR_A_DISK = """
import sys
from pathlib import Path
from jobs.health.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]) / "hang") as watchdog:
    watchdog.step(7)
    open(sys.argv[1] + "/metrics", "w")
    watchdog.step(8)
"""


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_disk_that_stands_still_for_longer_than_a_step_may_take_is_waited_for(
    comes_back: bool, tmp_path: Path
) -> None:
    """Pipes that nobody reads stand for files on it: what the process writes, and what the one that looks on does."""
    pipes = [tmp_path / name for name in (".written-0", "metrics")]
    for pipe in pipes:
        os.mkfifo(pipe)
    command = [sys.executable, "-c", WAITS_FOR_A_DISK, str(tmp_path)]
    environment = {**os.environ, VARIABLE: "3" if comes_back else "0.1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        if comes_back:
            wait_until(lambda: any(writes(pid) for pid in children(process.pid, "watcher.py")))
            time.sleep(watcher.STACKS_S + 1)
            for pipe in pipes:
                os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == (0 if comes_back else -signal.SIGKILL), said
    assert ("no progress for" in said) != comes_back, said
    assert (tmp_path / "hang").exists() != comes_back


def writes(watcher: int) -> bool:
    """Whether it has begun to find out about the disk, which a thread does."""
    return len(os.listdir(f"/proc/{watcher}/task")) > 1


@pytest.mark.processes  # the one that looks on
def test_a_python_without_nameless_memory_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with Watchdog(tmp_path) as watchdog:
        watchdog.step(1)
        assert watchdog._memory is not None
        assert watchdog._memory[HEADER.size :].startswith(b"step 2\0")
