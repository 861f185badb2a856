"""`logs` shows what a run prints, and `--follow` goes on until the run has ended."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from jobs.storage import ownership
from jobs.storage.run_folder import RunFolder
from jobs.watch import logs
from tests.launching import NO_FIGURES, TINY, done, finish, interrupt, launch, start, status, steps_logged, wait_until

ENDLESS = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a")


def test_the_log_of_a_run_that_has_ended(tmp_path: Path) -> None:
    done("train", "1d", *TINY, "--train.steps", "50", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    shown = done("logs", "1d/a", cwd=tmp_path)
    assert shown.out == (tmp_path / "runs" / "1d" / "a" / "log.txt").read_text()
    assert "Finished runs/1d/a at step 50" in shown.out
    assert "runs/1d/a/log.txt" in shown.err
    assert done("logs", "1d/a", "--follow", cwd=tmp_path).out == shown.out


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    training = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: bool(ownership.is_locked(run)))  # until then it counts as a run that has not begun
    training.send_signal(signal.SIGSTOP)
    with suppress(FileNotFoundError):  # as before its first line; if that was written, this file goes on
        (run / "log.txt").rename(run / "log.aside")
    following = start("logs", run, "--follow", cwd=tmp_path)
    assert following.stderr is not None
    assert "is not there yet" in following.stderr.readline()
    with suppress(FileNotFoundError):
        (run / "log.aside").rename(run / "log.txt")
    training.send_signal(signal.SIGCONT)
    wait_until(lambda: steps_logged(run) > 10)
    interrupt(training, signal.SIGINT)
    ended = finish(following)
    assert ended.code == 0
    assert f"Saved runs/1d/a at step {status(run)['step']:,}" in ended.out


def test_following_a_run_that_is_killed_ends_too(tmp_path: Path) -> None:
    training = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    following = start("logs", run, "--follow", cwd=tmp_path)
    os.kill(training.pid, signal.SIGKILL)
    finish(training)
    assert finish(following).code == 0


def test_a_killed_run_that_has_printed_nothing_is_not_said_to_run(tmp_path: Path) -> None:
    training = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    os.kill(training.pid, signal.SIGKILL)
    finish(training)
    (run / "log.txt").unlink(missing_ok=True)
    shown = done("logs", run, "--follow", cwd=tmp_path)
    assert shown.err.endswith("log.txt is not there; the run is failed\n")


def test_ctrl_c_ends_following_and_nothing_else(tmp_path: Path) -> None:
    training = start(*ENDLESS, cwd=tmp_path, **NO_FIGURES)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until(lambda: steps_logged(run) > 10)
    following = start("logs", run, "--follow", cwd=tmp_path)
    assert following.stderr is not None
    assert "log.txt" in following.stderr.readline()
    ended = interrupt(following, signal.SIGINT)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert training.poll() is None
    interrupt(training, signal.SIGINT)


def test_a_failure_is_shown_where_the_run_printed_it_on_a_terminal(tmp_path: Path) -> None:
    explode = ("--train.lr", "1e30", "--train.warmup-steps", "0", "--train.steps", "200", "--name", "a")
    assert launch("train", "1d", *TINY, *explode, cwd=tmp_path).code == 1
    shown = done("logs", "1d/a", cwd=tmp_path)
    assert "not finite" in shown.out
    assert "log.txt is not there; the run is failed" in shown.err


def test_a_file_that_comes_late_grows_and_is_cut(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.path.mkdir()
    alive, texts, titles = [True], [], []
    reader = threading.Thread(
        target=lambda: texts.extend(logs.follow(run, lambda: alive[0], titles.append)), daemon=True
    )
    reader.start()
    wait_until(lambda: bool(titles))
    run.log.write_text("one\ntwo\n")
    wait_until(lambda: "".join(texts) == "one\ntwo\n")
    with run.log.open("a") as file:
        file.write("half")
    wait_until(lambda: "".join(texts) == "one\ntwo\nhalf")
    run.log.write_text("new\n")  # shorter: written anew
    wait_until(lambda: "".join(texts) == "one\ntwo\nhalfnew\n")
    alive[0] = False
    reader.join(timeout=120)
    assert not reader.is_alive()
    assert len(titles) == 1


def test_a_letter_that_is_written_in_two_pieces_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_S", 0.0)
    run, pieces = RunFolder(tmp_path), [b"L\xc3", b"\xa4ufe\n"]

    def is_alive() -> bool:
        if pieces:
            with run.log.open("ab") as file:
                file.write(pieces.pop(0))
            return True
        return False

    assert "".join(logs.follow(run, is_alive, lambda _: None)) == "Läufe\n"
