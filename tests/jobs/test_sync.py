"""`sync` sends what was tracked offline: all of it, in order, and nothing twice."""

import contextlib
import gzip
import json
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs.storage.run_folder import RunFolder
from jobs.watch import sync
from tests.held import AFTER_STEP, held, is_held, let_go, start_held
from tests.jobs.test_tracking import KEY, OFFLINE, absent, serving
from tests.launching import NO_FIGURES, TINY, Process, done, finish, interrupt, launch, steps_logged, wait_until

TRAIN = ("train", "1d", *TINY, "--name", "a", "--train.checkpoint-every", "50")


class Keeping(BaseHTTPRequestHandler):
    """Answers as wandb's server does where a run is sent, and keeps the rows of each run by their position."""

    protocol_version = "HTTP/1.1"
    rows: ClassVar[dict[str, dict[int, dict[str, Any]]]] = defaultdict(dict)
    events: ClassVar[list[dict[str, Any]]] = []
    is_stopped: ClassVar[bool] = False
    streams: ClassVar[list[str]] = []

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # wandb's process has ended, or was killed
            super().handle()

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body) if self.headers.get("Content-Type") == "application/json" else {}  # or telemetry
        if self.path.endswith("file_stream"):
            run = self.path.split("/")[-2]
            self.streams.append(run)
            lines = (asked.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.events.extend(
                map(json.loads, (asked.get("files") or {}).get("wandb-events.jsonl", {}).get("content", []))
            )
            self.rows[run].update({lines["offset"] + i: json.loads(line) for i, line in enumerate(lines["content"])})
            self._answer({"stopped": self.is_stopped})
        else:
            self._answer(self._graphql(asked.get("query", ""), asked.get("variables") or {}))

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "entityName": "e"}
        bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "project": project}
        if "RunResumeStatus" in query:
            return {"data": {"model": {**project, "bucket": self._resumed(bucket) if self.rows[str(name)] else None}}}
        if "upsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            address = f"http://{self.headers['Host']}/"
            files = [{"name": file, "uploadUrl": address} for file in given["files"]]
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "v", "entity": "e", "flags": "{}", "teams": {"edges": []}}}}
        return {"errors": [{"message": "unknown to this server"}]}

    def _resumed(self, bucket: dict[str, Any]) -> dict[str, Any]:
        rows = self.rows[bucket["name"]]
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        last = json.dumps(rows[max(rows)])
        tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        return {**bucket, **counts, **tails, "tags": [], "wandbConfig": '{"t": 1}'}

    def _answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Keeping]]:
    """A server, and an environment in which wandb finds it."""
    Keeping.rows.clear()
    Keeping.streams.clear()
    Keeping.events.clear()
    Keeping.is_stopped = False
    with serving(Keeping) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield Keeping


def steps_of(rows: dict[int, dict[str, Any]]) -> list[int]:
    """The steps of the losses that the server has, in their order; no position is empty."""
    assert sorted(rows) == list(range(len(rows)))
    return [row["step"] for _, row in sorted(rows.items()) if "loss/train" in row]


def begin(root: Path, steps: int, *, after: int) -> Process:
    """Starts a training that is tracked offline; it stands still after some steps, and wandb has a file."""
    run = RunFolder(root / "runs" / "1d" / "a")
    before = len(sync.segments(run))
    process = start_held(AFTER_STEP, after, *TRAIN, "--train.steps", steps, cwd=root, **OFFLINE)
    held(root)
    wait_until(lambda: len(sync.segments(run)) > before)
    return process


def test_all_segments_are_sent_in_order_and_once(server: type[Keeping], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    interrupt(begin(tmp_path, 300, after=100), signal.SIGTERM)
    first = steps_logged(run.path)
    process = begin(tmp_path, 300, after=50)
    early = done("sync", "1d/a", cwd=tmp_path, WANDB_MODE="offline")
    assert "sending segment 1 of 1" in early.out
    assert "wandb has 1 of 2 segments; the last one is being written" in early.out
    name = run.read_launch()["wandb_id"]
    assert steps_of(server.rows[name])[-1] == first < 300
    let_go(tmp_path)
    assert finish(process).code == 0
    done("sample", "1d/a", "--num-samples", "100", "--steps", "3", "--name", "s", cwd=tmp_path, **OFFLINE, **NO_FIGURES)
    sent = done("sync", "1d/a", cwd=tmp_path)
    assert "wandb has 3 of 3 segments." in sent.out
    assert steps_of(server.rows[name]) == list(range(1, 301))
    (samples,) = set(server.rows) - {name}
    assert [row["run/done"] for row in server.rows[samples].values() if "run/done" in row] == [1]
    server.streams.clear()
    again = done("sync", "1d/a", cwd=tmp_path)
    assert again.out == "runs/1d/a: wandb has 3 of 3 segments.\n"
    assert server.streams == []


def test_a_living_run_is_sent_over_a_kill_and_a_restart(
    server: type[Keeping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "LOOK_S", 0.2)
    processes = [begin(tmp_path, 200, after=70)]
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    said: list[str] = []

    def is_alive(run: RunFolder) -> bool:
        sending = sum("while it is written" in line for line in said)
        if sending == len(processes) == 1:
            processes[0].kill()
            finish(processes[0])
            processes.append(begin(tmp_path, 200, after=50))
        elif sending == 2 and is_held(tmp_path):
            let_go(tmp_path)
            (tmp_path / "held-0").unlink()
        return processes[-1].poll() is None

    sync.sync_live([run], is_alive, said.append)
    assert finish(processes[1]).code == 0
    assert all(map(sync.is_sent, sync.segments(run)))
    live = [re.findall("offline-run-[^/ ]*", line)[0] for line in said if "while it is written" in line]
    assert live == [segment.parent.name for segment in sync.segments(run)]
    rows = server.rows[run.read_launch()["wandb_id"]]
    assert set(steps_of(rows)) == set(range(1, 201))


def test_what_cannot_be_sent_is_said_in_one_sentence(tmp_path: Path) -> None:
    done(*TRAIN, "--train.steps", "10", cwd=tmp_path, **OFFLINE, **NO_FIGURES)
    with absent() as address:
        ended = launch("sync", "1d/a", cwd=tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY=KEY)
    assert ended.code == 1
    assert ended.err == f"error: nothing can be sent: {address} does not answer within 3 s\n"
    assert not sync.is_sent(sync.segments(RunFolder(tmp_path / "runs" / "1d" / "a"))[0])
    done(*TRAIN, "--train.steps", "10", "--name", "b", cwd=tmp_path, WANDB_MODE="disabled", **NO_FIGURES)
    ended = launch("sync", "1d/b", "1d/a", cwd=tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY=KEY)
    assert ended.code == 1 and "does not answer" in ended.err
    assert ended.out.startswith("runs/1d/b: there is nothing to send: it was not tracked")
    assert done("sync", "1d/b", cwd=tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY=KEY).out == ended.out
    ended = launch("sync", cwd=tmp_path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
