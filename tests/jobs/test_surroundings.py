"""What decorates a result, and who looks on, do not decide over it: the run is finished, and the same command draws."""

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from commands.where import Launch
from diffusion.errors import UserError
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.terminal.progress import Progress
from tests.launching import NO_FIGURES, ROOT, TINY, Finished, done, finish, start, status

A_RUN = ("train", "1d", *TINY, "--diffusion.timesteps", "21", "--train.steps", "30", "--name", "a", "--device", "cpu")
NOTEBOOK = {"MPLBACKEND": "module://a_backend_that_is_not_installed"}


GONE = "import of matplotlib halted"


def test_figures_that_cannot_be_drawn_are_named_and_drawn_by_the_same_command(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    ended = done(*A_RUN, cwd=tmp_path, **NO_FIGURES)
    assert f"figures and final numbers could not be drawn ({GONE}" in ended.out
    assert "Traceback" not in ended.out + ended.err
    assert GONE in (run / "log.txt").read_text()
    assert (status(run)["state"], status(run)["step"]) == ("finished", 30)
    assert GONE in status(run)["missing"]
    assert GONE in done("status", "1d/a", cwd=tmp_path).out
    weights = (run / "checkpoints" / "step-00000030" / "model.safetensors").read_bytes()
    metrics = (run / "metrics.jsonl").read_bytes()
    again = done(*A_RUN, cwd=tmp_path)
    assert "W1 of 100,000 samples" in again.out
    assert {"samples.png", "training.png"} <= {path.name for path in (run / "figures").iterdir()}
    assert "missing" not in status(run)
    assert (run / "checkpoints" / "step-00000030" / "model.safetensors").read_bytes() == weights
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert "is finished" in done(*A_RUN, cwd=tmp_path).out


def test_so_are_those_of_samples_and_evaluations(tmp_path: Path) -> None:
    done(*A_RUN, cwd=tmp_path, **NO_FIGURES)
    sample = ("sample", "1d/a", "--num-samples", "50", "--device", "cpu")
    evaluate = ("evaluate", "1d/a", "--device", "cpu")
    ended = done(*sample, cwd=tmp_path, **NO_FIGURES)
    assert f"grid.png could not be drawn ({GONE}" in ended.out
    [folder] = (tmp_path / "runs" / "1d" / "a" / "samples").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    samples = (folder / "samples.npz").read_bytes()
    done(*sample, cwd=tmp_path)
    assert (folder / "grid.png").exists()
    assert (folder / "samples.npz").read_bytes() == samples
    assert "already" in done(*sample, cwd=tmp_path).out

    ended = done(*evaluate, cwd=tmp_path, **NO_FIGURES)
    assert f"its figures could not be drawn ({GONE}" in ended.err
    assert "W1 to the exact mixture" in ended.out
    assert not (folder / "samplers.png").exists()
    done(*evaluate, cwd=tmp_path)
    assert (folder / "samplers.png").exists()


def test_a_notebooks_backend_is_not_asked_for_and_letters_that_a_terminal_does_not_have_are_replaced(
    tmp_path: Path,
) -> None:
    folder, narrow = tmp_path / "Läufe", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = done(*A_RUN, "--runs-dir", folder, cwd=tmp_path, **NOTEBOOK, **narrow)
    assert "WARNING" not in ended.out
    assert "L?ufe" in ended.out
    assert "Läufe" in (folder / "1d" / "a" / "log.txt").read_text(encoding="utf-8")
    assert (folder / "1d" / "a" / "figures" / "samples.png").exists()


OF_OTHER_LAUNCHERS = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "MV2_COMM_WORLD_SIZE": "2",
    "PMI_RANK": "1",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_MIXED_PRECISION": "x",
}


def test_variables_of_other_launchers_change_nothing(tmp_path: Path) -> None:
    """With them, the training would wait for another process for ever, or be a traceback."""
    run = tmp_path / "runs" / "1d" / "a"
    plain = done(*A_RUN[:-4], "--name", "b", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    ended = finish(start(*A_RUN, cwd=tmp_path, **NO_FIGURES, **OF_OTHER_LAUNCHERS), timeout_s=60)
    assert ended.out.replace("1d/a", "1d/b") == plain.out
    checkpoint = Path("checkpoints", "step-00000030", "manifest.json")
    assert (run / checkpoint).read_bytes() == (run.with_name("b") / checkpoint).read_bytes()


@pytest.mark.parametrize(
    "variables", [{"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}]
)
def test_copies_that_torchrun_has_started_are_refused(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="must be started once, and by itself: --gpus 2 starts 2 processes"):
        Launch(cluster="local").place(RunFolder(tmp_path))


def in_a_shell(redirection: str, cwd: Path, **more: str) -> Finished:
    """A training whose streams a shell has changed."""
    command = " ".join([sys.executable, str(ROOT / "launch.py"), *A_RUN, redirection])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", **more}
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    return Finished(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&-", "| true"])
def test_who_reads_the_output_does_not_decide_over_the_run(
    redirection: str, tmp_path: Path, no_plots: dict[str, str]
) -> None:
    draws = redirection == "| true"  # the last words of a training are those of its figures
    ended = in_a_shell(redirection, tmp_path, **({} if draws else no_plots))
    run = tmp_path / "runs" / "1d" / "a"
    assert ended.code == 0, ended
    assert status(run)["state"] == "finished"
    assert "Finished" in (run / "log.txt").read_text()
    assert (run / "figures" / "training.png").exists() == draws


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path, no_plots: dict[str, str]) -> None:
    """As after `disown`: the terminal is closed while the training writes its bar onto it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, str(ROOT / "launch.py"), *A_RUN[:-6], "--train.steps", "1000", *A_RUN[-4:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", **no_plots}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while b"train" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(300) == 0
    run = tmp_path / "runs" / "1d" / "a"
    assert (status(run)["state"], status(run)["step"]) == ("finished", 1000)


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_a_plain_terminal_gets_lines_in_place_of_a_bar(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(Console(None), "train", 10, 0, "images", 1)
    assert progress._bar.disable == (kind == "dumb")
    progress.close()


def test_a_reader_of_logs_that_leaves_still_ends_it(tmp_path: Path) -> None:
    done(*A_RUN, cwd=tmp_path, **NO_FIGURES)
    command = f"{sys.executable} {ROOT / 'launch.py'} logs 1d/a | true"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
