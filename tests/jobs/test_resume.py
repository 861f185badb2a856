"""An interrupted run equals an uninterrupted one, byte for byte, whatever interrupts it."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.launching import (
    NO_FIGURES,
    TINY,
    Finished,
    done,
    finish,
    launch,
    relatives,
    slowed,
    start,
    status,
    steps_logged,
    wait_until,
    workers,
)

STEPS = {1: 160, 2: 80, 4: 32}
"""Of a 1D run, by its number of processes; with more, each takes longer."""
CHECKPOINT_EVERY = {1: 16, 2: 10, 4: 5}
SLOWED = {1: 0.005, 2: 0.01, 4: 0.02}
"""Seconds that a disturbed run waits in each of these steps: the signal comes between, though there are few."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "fp32": ("1d", *TINY, "--train.held-out-every", "25"),
    "bf16": (
        *("mnist-small", "--model.dim", "8", "--model.dim-mults", "1", "--model.attn-heads", "1"),
        *("--train.batch-size", "4", "--train.steps", "12", "--train.checkpoint-every", "3"),
        *("--train.log-every", "1", "--train.precision", "bf16", "--train.held-out-every", "7"),
    ),
}


def arguments(precision: str, processes: int, name: str) -> list[str]:
    every = str(CHECKPOINT_EVERY[processes])
    steps = ["--train.steps", str(STEPS[processes]), "--train.checkpoint-every", every] if precision == "fp32" else []
    return ["train", *SETTINGS[precision], *steps, "--name", name, "--device", "cpu", "--gpus", str(processes)]


def run_folder(root: Path, precision: str, name: str) -> Path:
    return root / "runs" / SETTINGS[precision][0] / name


def result(run: Path) -> dict[str, bytes]:
    """The final checkpoint's files and the metrics."""
    final = max((run / "checkpoints").glob("step-*"))
    files = {path.name: path.read_bytes() for path in sorted(final.iterdir())}
    return {"final": final.name.encode(), "metrics": (run / "metrics.jsonl").read_bytes(), **files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Callable[[str, int], dict[str, bytes]]:
    """The result of a run that nothing disturbs, for each precision and number of processes."""
    root = tmp_path_factory.mktemp("uninterrupted")

    @cache
    def reference(precision: str, processes: int) -> dict[str, bytes]:
        name = f"{precision}-{processes}"
        done(*arguments(precision, processes, name), cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
        return result(run_folder(root, precision, name))

    return reference


def disturb(kind: str, root: Path, precision: str, processes: int, at_line: int, env: dict[str, str]) -> Finished:
    """Starts a run, interrupts it once after so many logged steps, and waits for its end.

    Does it again if this process was held up until the run had made all its steps.
    """
    run, whole = run_folder(root, precision, "disturbed"), STEPS[processes] if precision == "fp32" else 12
    slowly = slowed("jobs.train.loop", "logged", SLOWED[processes] if precision == "fp32" else 0.05)
    for _ in range(3):
        shutil.rmtree(run, ignore_errors=True)
        process = start(*arguments(precision, processes, "disturbed"), cwd=root, **env, **slowly)
        wait_until(lambda p=process: steps_logged(run) >= at_line or p.poll() is not None, timeout_s=120)
        if kind != "crash":
            process.send_signal(signal.SIGKILL if kind == "kill -9" else signal.Signals[kind])
        elif children := sorted({*workers(process)} - {process.pid}):
            with suppress(ProcessLookupError):
                os.kill(random.Random(at_line).choice(children), signal.SIGKILL)
        ended = finish(process)
        wait_until(lambda p=process: not relatives(p))
        if steps_logged(run) < whole:
            break
    return ended


CODES = {"SIGINT": 130, "SIGTERM": 130, "SIGUSR1": 130, "SIGUSR2": 130, "kill -9": -9, "crash": 1}
CASES = [
    *[("fp32", 1, kind) for kind in ("SIGINT", "SIGTERM", "SIGUSR2", "kill -9")],
    *[("fp32", 2, kind) for kind in ("SIGINT", "SIGUSR1", "kill -9", "crash")],
    ("fp32", 4, "crash"),  # SIGTERM: below
    *[("bf16", 1, "SIGTERM"), ("bf16", 2, "SIGUSR2")],
]


@pytest.mark.parametrize(("precision", "processes", "kind"), CASES)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    precision: str,
    processes: int,
    kind: str,
    uninterrupted: Callable[[str, int], dict[str, bytes]],
    tmp_path: Path,
    mnist_root: Path,
) -> None:
    env = {"MNIST_ROOT": str(mnist_root), **NO_FIGURES}
    expected = uninterrupted(precision, processes)
    lines = expected["metrics"].count(b"\n")
    at_line = random.Random(f"{precision}{processes}{kind}").randrange(1, lines // 2)
    ended = disturb(kind, tmp_path, precision, processes, at_line, env)
    assert ended.code == CODES[kind], ended
    run = run_folder(tmp_path, precision, "disturbed")
    if kind == "crash":
        assert status(run)["state"] == "failed"
        refused = launch(*arguments(precision, processes, "disturbed"), cwd=tmp_path, **env)
        assert refused.code == 2
        assert "resume" in refused.err
        done("resume", run, "--device", "cpu", "--gpus", processes, cwd=tmp_path, **env)
    else:
        done(*arguments(precision, processes, "disturbed"), cwd=tmp_path, **env)
    assert status(run)["restarts"] == 1
    found = result(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_run_may_go_on_with_as_many_processes_or_with_another_number(
    uninterrupted: Callable[[str, int], dict[str, bytes]], tmp_path: Path
) -> None:
    """Another number adds up the same gradients in another order."""
    expected = uninterrupted("fp32", 4)
    ended = disturb("SIGTERM", tmp_path, "fp32", 4, STEPS[4] // 2, NO_FIGURES)
    assert ended.code == 130
    run = run_folder(tmp_path, "fp32", "disturbed")
    alone = Path(shutil.copytree(run, run.with_name("alone")))
    done(*arguments("fp32", 4, "disturbed"), cwd=tmp_path, **NO_FIGURES)
    assert status(run)["restarts"] == 1
    assert result(run) == expected
    done("resume", alone, "--device", "cpu", "--gpus", 1, cwd=tmp_path, **NO_FIGURES)
    ours = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in expected["metrics"].decode().splitlines()]
    assert [line["step"] for line in ours] == [line["step"] for line in whole] == list(range(1, STEPS[4] + 1))
    for a, b in zip(ours, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
