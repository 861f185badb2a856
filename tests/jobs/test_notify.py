"""People are told once that a run has finished or has failed, and nobody who tells them can hold it up or fail it."""

import errno
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import notify
from jobs.followers import loop
from jobs.storage.run_folder import RunFolder
from tests.held import AFTER_STEP, held, start_held
from tests.jobs.test_tracking import alerts, history, segments
from tests.launching import NO_FIGURES, TINY, Finished, interrupt, launch, sentence

SECRET = "services/T0/xoxb-secret"


class Server:
    """A real web server that keeps what is posted to it."""

    def __init__(self, answer: int = 200, waits: bool = False) -> None:
        self.received: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.leave = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.paths.append(self.path)
                if waits:
                    outer.leave.wait(60)
                self.send_response(answer)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"

    def close(self) -> None:
        self.leave.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called `mail`, which keeps what it is given in the file that is returned."""
    folder, box = tmp_path / "tools", tmp_path / "box"
    folder.mkdir()
    (folder / "mail").write_text(f'#!/bin/sh\necho "mail: $*" >> {box}\ncat >> {box}\n')
    (folder / "mail").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return box


def train(folder: Path, server: Server, *more: object, channels: str = "mail webhook", **env: str) -> Finished:
    notified = ("--tracking.notify", *channels.split())
    environment = {"DIFFUSION_WEBHOOK": server.url, "DIFFUSION_MAIL": "me@example.org", **NO_FIGURES, **env}
    return launch("train", "1d", *TINY, "--name", "a", *more, *notified, cwd=folder, **environment)


def shows_the_secret(folder: Path, ended: Finished) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    where = [str(path) for path in files if b"xoxb" in path.read_bytes()]
    return where + [text for text in (ended.out, ended.err) if "xoxb" in text]


def test_a_finished_run_is_told_once(tmp_path: Path, server: Server, mail: Path) -> None:
    ended = train(tmp_path, server, "--train.steps", 30)
    assert ended.code == 0, ended
    (posted,) = server.received
    assert server.paths == [f"/{SECRET}"]
    assert (posted["run"], posted["event"], posted["step"], posted["total"]) == ("1d/a", "finished", 30, 30)
    assert posted["text"] == posted["content"]
    assert posted["text"].startswith("1d/a is finished\nstep 30 of 30, loss ")
    box = mail.read_text()
    assert box.startswith("mail: -s 1d/a is finished me@example.org\nstep 30 of 30, loss ")
    assert str(tmp_path / "runs" / "1d" / "a") in box
    assert shows_the_secret(tmp_path / "runs", ended) == []
    assert "tracking.notify mail webhook, " in launch("status", "1d/a", cwd=tmp_path).out
    assert train(tmp_path, server, "--train.steps", 30).code == 0  # which draws what is missing
    assert len(server.received) == 1
    longer = ("resume", "1d/a", "--train.steps", 60, "--tracking.notify", "webhook")
    assert launch(*longer, cwd=tmp_path, DIFFUSION_WEBHOOK=server.url, **NO_FIGURES).code == 0
    assert [posted["step"] for posted in server.received] == [30, 60]


def test_an_interruption_is_not_told_and_what_follows_is(tmp_path: Path, server: Server, mail: Path) -> None:
    arguments = ("train", "1d", *TINY, "--name", "a", "--train.steps", "40", "--tracking.notify", "webhook")
    training = start_held(AFTER_STEP, 10, *arguments, cwd=tmp_path, DIFFUSION_WEBHOOK=server.url)
    held(tmp_path)
    assert interrupt(training, signal.SIGINT).code == 130
    assert server.received == []
    assert launch(*arguments, cwd=tmp_path, DIFFUSION_WEBHOOK=server.url, **NO_FIGURES).code == 0
    assert [posted["event"] for posted in server.received] == ["finished"]


def test_a_failure_of_two_processes_is_told_once_and_again_if_it_is_resumed(
    tmp_path: Path, server: Server, mail: Path
) -> None:
    explode = ("--train.lr", "1e30", "--train.warmup-steps", "0", "--train.steps", "200", "--device", "cpu")
    ended = train(tmp_path, server, *explode, "--gpus", 2)
    assert ended.code == 1
    (posted,) = server.received
    assert posted["event"] == "failed"
    assert "not finite" in posted["detail"] and "launch.py resume" in posted["text"]
    assert mail.read_text().count("mail: -s 1d/a has failed") == 1
    env = {"DIFFUSION_WEBHOOK": server.url, **NO_FIGURES}
    again = launch("resume", "1d/a", "--gpus", 2, "--device", "cpu", cwd=tmp_path, **env)
    assert again.code == 1
    assert len(server.received) == 2


def test_a_server_that_is_slow_or_refuses_does_not_fail_a_run(tmp_path: Path, mail: Path) -> None:
    slow, refusing = Server(waits=True), Server(answer=403)
    try:
        for server, words in ((slow, "cannot be reached (TimeoutError)"), (refusing, "answers with error 403")):
            folder = tmp_path / str(server.url.rpartition(":")[2].partition("/")[0])
            folder.mkdir()
            ended = train(folder, server, "--train.steps", 20)
            assert ended.code == 0
            assert f"Nobody is told by webhook: the server {words}" in ended.out, ended
            assert len(server.received) == 1
            assert shows_the_secret(folder, ended) == []
    finally:
        slow.close()
        refusing.close()
    assert mail.read_text().count("is finished") == 2


def test_wandb_gets_one_alert_and_not_in_the_file_of_an_offline_run(tmp_path: Path, server: Server) -> None:
    ended = train(tmp_path, server, "--train.steps", 20, channels="wandb", WANDB_MODE="offline")
    assert ended.code == 0
    shown = segments(tmp_path / "runs" / "1d" / "a")
    told = [(alerts(segment), history(segment, "loss/train") != []) for segment in shown]
    assert sorted(told) == [([], True), (["1d/a is finished"], False)]  # in one of its own, sent if the network is back


def test_people_are_told_although_no_temporary_folder_can_be_made(
    tmp_path: Path, server: Server, mail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert train(tmp_path, server, "--train.steps", 20, channels="mail").code == 0
    mail.unlink()
    for place, name in ((tempfile, "mkdtemp"), (tempfile, "gettempdir"), (loop, "_kill_children")):
        monkeypatch.setattr(place, name, full if place is tempfile else lambda: None)
    for place, name in ((signal, "signal"), (signal, "alarm"), (os, "_exit")):
        monkeypatch.setattr(place, name, lambda *arguments: None)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("sys.argv", ["notify", str(tmp_path / "runs" / "1d" / "a"), "failed", "the disk is full"])
    monkeypatch.setenv("DIFFUSION_MAIL", "me@example.org")
    notify.main()
    assert "1d/a has failed" in mail.read_text()


def test_only_one_of_several_who_notice_tells(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path, server, "--train.steps", 20, channels="webhook").code == 0
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    monkeypatch.setenv("DIFFUSION_WEBHOOK", server.url)
    threads = [threading.Thread(target=notify.tell, args=(run, "hung", print, "silent for 5 min")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notify.tell(run, "hung", print)
    notify.tell(run, "failed", print)  # it has not: what has stopped it is tried again
    assert [posted["event"] for posted in server.received] == ["finished", "hung"]
    assert "silent for 5 min" in server.received[1]["text"]
    notify.rearm(run)
    notify.tell(run, "hung", print)
    assert len(server.received) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tracking.notify", "webhook"), "needs $DIFFUSION_WEBHOOK"),
        (("--tracking.notify", "wandb", "--tracking.mode", "disabled"), "needs a tracking.mode other than disabled"),
    ],
)
def test_what_cannot_be_told_is_refused(flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refused = launch("train", "1d", *TINY, "--train.steps", "20", *flags, cwd=tmp_path)
    assert refused.code == 2
    assert words in sentence(refused.err)
    assert list(tmp_path.iterdir()) == []


def test_the_profile_names_the_channels_unless_the_settings_do(tmp_path: Path, server: Server, mail: Path) -> None:
    (tmp_path / "site.toml").write_text('notify = ["mail"]')
    arguments = ("train", "1d", *TINY, "--train.steps", "20", "--profile", "site.toml")
    for more in ((), ("--tracking.notify",)):
        assert launch(*arguments, *more, cwd=tmp_path, **NO_FIGURES).code == 0
    assert mail.read_text().count("is finished") == 1
