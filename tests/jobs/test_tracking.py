"""Tracking: what wandb holds is what the run's files say, whatever happens to processes, servers and disks."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from jobs import notify
from jobs.experiments.settings import TrackingSettings
from jobs.followers import training
from jobs.followers.curves import Curves
from jobs.followers.training import TrainingFollower
from jobs.storage.ownership import Ownership
from jobs.storage.records import Tail
from jobs.storage.run_folder import RunFolder
from jobs.tracking import dashboard, server
from jobs.tracking.dashboard import Level, NoDashboard
from jobs.tracking.identity import Identity, Machine
from jobs.tracking.server import why_not_online
from tests.held import AFTER_STEP, held, let_go, start_held
from tests.launching import (
    NO_FIGURES,
    TINY,
    Process,
    done,
    finish,
    interrupt,
    relatives,
    slowed,
    start,
    status,
    steps_logged,
    wait_until,
)

WANDB = Path(str(find_spec("wandb").origin)).parent  # type: ignore[union-attr]
READER = (WANDB / "bin" / "wandb-core", "leet", "inspect", "--no-observability", "--json", "--run-file")
"""What `wandb leet inspect --json` runs, once it has imported wandb."""
KEY = "0123456789" * 4
OFFLINE = {"WANDB_MODE": "offline"}


def segments(run: Path) -> list[list[dict[str, Any]]]:
    """The records of each of the run's wandb files, oldest first, as wandb's own reader prints them."""
    found = []
    # A signal may have ended wandb's process between the folder and its file.
    for written in sorted(path for path in run.glob("wandb/*run-*/*.wandb") if not path.parent.is_symlink()):
        command = [*READER, written, written.parent.parent]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append([json.loads(line) for line in printed.splitlines()])
    return found


def test_files_are_read_as_wandb_reads_them_and_nothing_else_is_left(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env = {**OFFLINE, **NO_FIGURES, "TMPDIR": str(temporary)}
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **env)
    assert list(temporary.iterdir()) == []
    run = tmp_path / "runs" / "1d" / "a"
    (folder,) = run.glob("wandb/offline-run-*")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert segments(run) == [[json.loads(line) for line in printed.splitlines()]]


def history(segment: list[dict[str, Any]], name: str) -> list[tuple[int, Any]]:
    """(step, value) of all rows with this quantity, in order."""
    items = [record["history"]["item"] for record in segment if record["type"] == "history"]
    return [(item["step"], item[name]) for item in items if name in item]


def system(segment: list[dict[str, Any]], name: str) -> list[float]:
    """All values of a quantity of the machine, in order."""
    items = [record["stats"]["item"] for record in segment if record["type"] == "stats"]
    return [item[name] for item in items if name in item]


def printed(segment: list[dict[str, Any]]) -> str:
    """What the page's Logs hold."""
    return "".join(record["output_logger"]["line"] for record in segment if record["type"] == "output_logger")


def alerts(segment: list[dict[str, Any]]) -> list[str]:
    return [record["alert"]["title"] for record in segment if record["type"] == "alert"]


def resident_mb(pid: int) -> float:
    """The memory that a process uses, as the kernel counts it: none if it has just ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return 0.0


def assert_one_curve(run: Path) -> list[list[dict[str, Any]]]:
    """One id in all segments; every logged step is there, with the values of metrics.jsonl however often it is there.

    Returns the segments.
    """
    found = segments(run)
    ids = {record["run"]["run_id"] for segment in found for record in segment if record["type"] == "run"}
    assert ids == {json.loads((run / "launch.json").read_text())["wandb_id"]}
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for name, key in (("loss/train", "loss"), ("optimizer/gradient_norm", "grad_norm")):
        rows = [row for segment in found for row in history(segment, name)]
        assert {step for step, _ in rows} == lines.keys()
        assert [row for row in rows if row[1] != lines[row[0]][key]] == []
    return found


def tell(processes: list[int], number: signal.Signals) -> None:
    """Sends the signal to each of them."""
    for pid in processes:
        with suppress(ProcessLookupError):  # it has ended because another one has
            os.kill(pid, number)


def test_a_kill_two_requeues_and_a_move_leave_one_curve(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    command = ("train", "1d", *TINY, "--name", "a", "--train.steps", "1000000", "--train.checkpoint-every", "100")
    slowly = slowed("jobs.train.loop", "logged", 0.01)  # it need not make a thousand steps while wandb writes one file
    process = start_held(AFTER_STEP, 60, *command, cwd=tmp_path, **OFFLINE, **slowly)
    held(tmp_path)
    wait_until((run / ".tracking.json").exists)
    node = relatives(process)  # now, as it takes a while to find them: wandb must not write meanwhile what it has
    let_go(tmp_path)
    certain = 100
    for _ in range(3):
        wait_until(lambda least=certain: json.loads((run / ".tracking.json").read_text())["step"] > least)
        tell(node, signal.SIGSTOP)  # what wandb has in memory stays there
        certain = json.loads((run / ".tracking.json").read_text())["step"]
        assert certain <= history(segments(run)[-1], "loss/train")[-1][0]
        tell(node, signal.SIGCONT)
    tell(node, signal.SIGKILL)  # the node fails: the follower and wandb's own process die as well
    finish(process)
    # Two requeues within wandb's flush interval, with signals that reach all processes of the job, as Slurm's do.
    for restarts, kind in ((1, signal.SIGUSR2), (2, signal.SIGTERM)):
        process = start(*command, cwd=tmp_path, **OFFLINE, **NO_FIGURES)
        wait_until(lambda n=restarts: status(run)["restarts"] == n)
        before = steps_logged(run)
        wait_until(lambda n=before: steps_logged(run) >= n + 20)
        tell(relatives(process), kind)
        assert finish(process).code == 130
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(run, moved)
    process = start("resume", moved, cwd=tmp_path, **OFFLINE)
    wait_until(lambda: status(moved)["restarts"] == 3 and steps_logged(moved) >= before + 100)
    assert interrupt(process, signal.SIGTERM).code == 130
    found = assert_one_curve(moved)
    assert len(found) >= 3
    compared = sum(len(history(segment, "loss/train")) for segment in found)
    assert compared > steps_logged(moved)  # so values logged twice have been among them
    restarts = [row for segment in found for row in history(segment, "run/restarts")]
    assert sorted({count for _, count in restarts}) == [0, 1, 2, 3]
    assert (moved / "figures" / "training.png").stat().st_size > 10_000
    times = json.loads(done("status", moved, "--json", cwd=tmp_path).out)["time"]
    rows = [history(found[-1], name)[-1][1] for name in ("time/redone_steps", "time/useful_s")]
    assert rows == [times["redone_steps"], pytest.approx(times["seconds"]["useful"], rel=0.01)]


def test_what_the_training_processes_use_is_shown_and_what_they_print(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    command = ("train", "1d", *TINY, "--train.steps", "1000000", "--train.grad-shards", "2", "--name", "a")
    command = (*command, "--train.log-every", "1000")

    def is_shown(count: int) -> bool:
        files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        return len(files) == count and files[-1].read_bytes().count(b"proc.memory.rssMB") > 3

    for restarts, processes in ((1, 1), (2, 2)):
        slowly = slowed("jobs.train.loop", "logged", 0.01)  # it need not have made thousands of steps by then
        env = {"WANDB_X_STATS_SAMPLING_INTERVAL": "0.5", **OFFLINE, **NO_FIGURES, **slowly}
        process = start(*command, "--device", "cpu", "--gpus", processes, cwd=tmp_path, **env)
        wait_until(lambda n=restarts: is_shown(n))
        used = sum(map(resident_mb, relatives(process)))
        alone = resident_mb(status(run)["pid"])
        assert interrupt(process, signal.SIGTERM).code == 130
    found = segments(run)
    last = found[-1]
    # At some time: the first and last samples have processes in them that are starting or ending.
    assert any(resident == pytest.approx(used, rel=0.3) for resident in system(last, "proc.memory.rssMB"))
    assert used > 2 * alone
    assert max(system(last, "cpu")) > 0
    # Each line once, in the segment of the start that has printed it.
    assert "".join(map(printed, found)) == (run / "log.txt").read_text()
    assert "Continuing" in printed(last)
    assert [count for segment in found for _, count in history(segment, "run/processes")] == [1, 2]


def test_a_failure_is_told_and_shown_and_so_are_skipped_steps(tmp_path: Path) -> None:
    explode = ("--train.lr", "1e30", "--train.warmup-steps", "0", "--train.steps", "200", "--name", "a")
    process = start("train", "1d", *TINY, *explode, "--tracking.notify", "wandb", cwd=tmp_path, **OFFLINE, **NO_FIGURES)
    assert finish(process).code == 1
    wait_until(lambda: relatives(process) == [])  # a job that fails does not wait for what follows it
    # Both may begin within a second, which their names tell.
    found = segments(tmp_path / "runs" / "1d" / "a")
    told, training = sorted(found, key=lambda segment: len(history(segment, "loss/train")))
    assert "was not finite in the 5 steps" in printed(training)
    assert [alerts(training), alerts(told)] == [["1d/a skips steps"], ["1d/a has failed"]]


@pytest.mark.parametrize(
    ("place", "calls", "code"), [("jobs.train.recorder.RunRecorder.save", 1, 0), (AFTER_STEP, 20, 1)]
)
def test_a_job_that_is_killed_has_ended_well_if_its_last_step_was_saved(
    place: str, calls: int, code: int, tmp_path: Path
) -> None:
    where = ("--train.steps", 50, "--train.checkpoint-every", 10, "--name", "a", "--gpus", 2, "--device", "cpu")
    process = start_held(place, calls, "train", "1d", *TINY, *where, cwd=tmp_path, **OFFLINE)
    held(tmp_path)
    run = tmp_path / "runs" / "1d" / "a"
    wait_until((run / ".tracking.json").exists)  # else wandb might not have begun
    os.kill(status(run)["pid"], signal.SIGKILL)
    assert (finish(process).code, status(run)["state"]) == ((0, "finished") if code == 0 else (1, "failed"))
    wait_until(lambda: relatives(process) == [])  # the follower, too
    (segment,) = segments(run)
    assert [record["exit"]["exit_code"] for record in segment if record["type"] == "exit"] == [code]
    assert alerts(segment) == (["1d/a is finished"] if code == 0 else [])


class Shown(NoDashboard):
    """Keeps the alerts."""

    is_shown = True

    def __init__(self) -> None:
        self.alerts: list[str] = []

    def alert(self, title: str, text: str, level: Level) -> None:
        self.alerts.append(f"{title}: {text.splitlines()[0]}")


def test_no_progress_and_the_end_are_told_once_and_nothing_without_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done("train", "1d", *TINY, "--train.steps", "20", "--name", "a", cwd=tmp_path, **NO_FIGURES)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    monkeypatch.setattr("jobs.followers.alerts.STUCK_S", 0.0)
    asked = tmp_path / "asked"
    note = f"import os, sys; open({str(asked)!r}, 'a').write(' '.join([str(os.getppid()), *sys.argv[1:]]) + chr(10))"
    (tmp_path / "launch.py").write_text(note)
    monkeypatch.setattr("jobs.tracking.stop_button.ROOT", tmp_path)
    experiment, config = run.read_experiment()
    here = Machine(pid=os.getpid(), tree=False, gpus=[], node="n1", nodes=1, is_first=True)

    def follow(*, asked: bool, steps: int) -> list[str]:
        """The alerts while a follower looks at the run twice and sees its end."""
        shown, tracking = Shown(), replace(config.tracking, alerts=asked, samples_every=0)
        run.write_experiment(experiment, replace(config, tracking=tracking, train=replace(config.train, steps=steps)))
        monkeypatch.setattr(training, "open_dashboard", lambda *_: shown)
        follower = TrainingFollower(run, Ownership.take(run.path), here, attempt=1)
        for look in (follower.look, follower.look, follower.look, follower.end):
            look()
        follower.stop_button.press()
        return shown.alerts

    assert follow(asked=False, steps=100) == []
    notify.rearm(run)
    (stuck, finished) = follow(asked=True, steps=100)
    assert stuck.startswith("1d/a makes no progress: It has been at step 20 ")
    assert finished.startswith("1d/a is finished: step 20, loss ")
    assert follow(asked=True, steps=20) == []
    # A server that still says Stop when the run goes on is not obeyed again.
    said = capsys.readouterr().out.splitlines()
    assert ["Stop was pressed" in line for line in said] == [True, False, False]
    # A follower that ends kills its children, but not what cancels the run.
    wait_until(lambda: asked.exists() and asked.read_text().endswith("\n"))
    parent, *command = asked.read_text().split()
    assert command == ["cancel", str(run.path)]
    assert int(parent) != os.getpid()


def test_a_training_its_samples_and_their_evaluation_are_one_group_with_pictures(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    small = ("--train.steps", "30", "--diffusion.timesteps", "30", "--name", "a")
    done("train", "1d", *TINY, *small, cwd=tmp_path, **OFFLINE)
    done("sample", "1d/a", "--num-samples", "1000", "--name", "s", cwd=tmp_path, **OFFLINE)
    done("evaluate", "1d/a", cwd=tmp_path, **OFFLINE)
    training, samples, evaluation = segments(run)
    begun = [next(r["run"] for r in segment if r["type"] == "run") for segment in (training, samples, evaluation)]
    assert [record["job_type"] for record in begun] == ["train", "sample", "evaluate"]
    assert {record["run_group"] for record in begun} == {"1d/a"}
    asked = begun[0]["config"]["update"]
    assert asked["train"]["batch-size"] == 64
    facts = ("experiment", "nodes", "processes", "precision", "device", "git-commit")
    commit = json.loads((run / "launch.json").read_text())["git_commit"]
    assert [asked[name] for name in facts] == ["1d", 1, 1, "fp32", "cpu", commit]
    network = load_file(run / "checkpoints" / "step-00000030" / "model.safetensors")
    assert asked["parameters"] == sum(tensor.numel() for tensor in network.values())
    settings = begun[1]["config"]["update"]
    named = ("sampler", "steps", "num-samples", "checkpoint", "weights")
    assert [settings[name] for name in named] == ["dpm++", 30, 1000, 30, "ema"]
    assert len(history(training, "results/samples._type")) == 1
    _, config = RunFolder(run).read_experiment()
    assert {value for _, value in history(training, "loss/floor")} == {config.build().loss_floor()}
    assert history(samples, "run/done")[-1] == (1000, 1)
    assert len(history(samples, "generated/grid._type")) == 1
    metrics = json.loads((run / "samples" / "s" / "metrics.json").read_text())["metrics"]
    assert history(evaluation, "quality/w1") == [(30, metrics["w1"]["value"])]
    assert history(evaluation, "quality/w1_floor") == [(30, metrics["w1"]["floor"])]
    assert len(history(evaluation, "results/samplers._type")) == 1
    for segment in (training, samples):
        assert sum(record["type"] == "artifact" for record in segment) == 1
        assert [record["exit"]["exit_code"] for record in segment if record["type"] == "exit"] == [0]


class _Refusing(BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Dying(_Refusing):
    """Answers as far as a run needs to begin online; once its first values have come, never again."""

    alive = True

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("file_stream"):
            type(self).alive = False
        if not self.alive:
            threading.Event().wait()
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        name = next(iter(re.findall(rb'"name":"(\\w+)"', asked)), b"").decode()
        bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "project": project}
        answers = {
            b"upsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            b"RunResumeStatus": {"model": {**project, "bucket": None}},
            b"viewer": {"viewer": {"id": "v", "entity": "e", "flags": "{}"}},
        }
        answer = next((answer for word, answer in answers.items() if word in asked), {})
        content = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def absent() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    yield address


def test_a_wrong_variable_and_long_names_leave_it_offline(tmp_path: Path) -> None:
    """wandb would start neither online nor offline, and would refuse the names of the artifacts."""
    name = 200 * "n"
    wrong = {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "soon", "WANDB_CONSOLE": "loud"}
    small = ("--train.steps", 20, "--name", name, "--device", "cpu")
    ended = done("train", "1d", *TINY, *small, cwd=tmp_path, **wrong, **NO_FIGURES)
    assert "wandb is offline: it does not take the value of WANDB_HTTP_TIMEOUT, WANDB_CONSOLE." in ended.out
    assert "Tracking" not in ended.out  # has stopped
    assert_one_curve(tmp_path / "runs" / "1d" / name)


def test_auto_is_offline_within_three_seconds_where_online_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with silent() as hanging:
        assert "no key" in str(why_not_online(hanging))
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert server.ANSWER_S == 3
        monkeypatch.setattr(server, "ANSWER_S", 1.0)
        assert "does not answer within 1 s" in str(why_not_online(hanging))
    with absent() as dead:
        assert "does not answer" in str(why_not_online(dead))
    monkeypatch.setattr(server, "ANSWER_S", 60.0)  # it is a thread of this process, which may be held up
    with serving(_Refusing) as strict:
        assert "does not accept the key" in str(why_not_online(strict))


def test_a_server_that_never_answers_holds_up_nothing(tmp_path: Path) -> None:
    command = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a", "--tracking.mode")
    env = {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": KEY, "WANDB_MODE": ""}
    with silent() as server:
        started, runs = {}, {}
        for mode in ("auto", "online"):
            cwd = tmp_path / mode
            cwd.mkdir()
            started[mode] = start_held(AFTER_STEP, 100, *command, mode, cwd=cwd, WANDB_BASE_URL=server, **env)
            runs[mode] = cwd / "runs" / "1d" / "a"
        for mode, run in runs.items():
            held(tmp_path / mode)
            wait_until(lambda run=run: len(list(run.glob("wandb/offline-run-*"))) == 1)
        for process in started.values():
            process.send_signal(signal.SIGTERM)
        for mode, run in runs.items():
            ended = finish(started[mode])
            assert ended.code == 130
            said = [line for line in ended.out.splitlines() if "wandb" in line]
            assert len(said) == 1, ended
            assert f"python launch.py sync {run}" in said[0]
            assert_one_curve(run)


def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    command = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a", "--tracking.mode", "auto")
    with serving(_Dying) as server:
        env = {"WANDB_BASE_URL": server, "WANDB_API_KEY": KEY, "WANDB_MODE": ""}
        process = start_held(AFTER_STEP, 100, *command, cwd=tmp_path, **env)
        wait_until(lambda: not _Dying.alive)
        let_go(tmp_path)
        wait_until(lambda: steps_logged(run) >= 300)
        ended = interrupt(process, signal.SIGTERM)
        assert ended.code == 130
        assert status(run)["state"] == "cancelled"
        (folder,) = (path for path in run.glob("wandb/run-*"))
        assert f"wandb sync {folder}" in ended.out
        assert_one_curve(run)
        wait_until(lambda: relatives(process) == [])


def test_a_full_disk_stops_tracking_and_not_the_training(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    command = ("train", "1d", *TINY, "--train.steps", "1000000", "--name", "a", "--tracking.samples-every", "0")

    def train_on(steps: int, mode: str) -> Process:
        """Starts or continues the run, which stands still after so many steps."""
        process = start_held(AFTER_STEP, steps, *command, cwd=tmp_path, WANDB_MODE=mode)
        held(tmp_path)
        return process

    interrupt(train_on(5, "disabled"), signal.SIGTERM)
    disk = run / "wandb"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    try:
        process = train_on(400, "offline")
        wait_until(lambda: shutil.disk_usage(disk).free == 0)
        lines = steps_logged(run)
        let_go(tmp_path)
        wait_until(lambda: steps_logged(run) >= lines + 100)
        assert interrupt(process, signal.SIGTERM).code == 130
        assert status(run)["state"] == "cancelled"
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    # What got lost with that disk is known only to those who remember how far wandb had got.
    (run / ".tracking.json").unlink(missing_ok=True)
    process = train_on(5, "offline")
    wait_until((run / ".tracking.json").exists)
    assert interrupt(process, signal.SIGTERM).code == 130
    assert_one_curve(run)


def test_the_dashboard_names_what_the_lines_say() -> None:
    curves = Curves(timesteps=1000, loss_floor=0.25)
    line = {"step": 10, "loss": 0.5, "lr": 0.1, "grad_norm": 2.0, "clipped": 1, "ema_decay": 0.9, "skipped": 0}
    bands = {f"loss_t{i}": float(i) for i in range(4)}
    skipped = {**line, **dict.fromkeys(bands), "loss": None, "clipped": 0, "skipped": 1}
    curves.row({**line, **bands})
    curves.row(skipped)
    row = curves.row({**line, **bands})
    assert row["loss/excess"] == row["loss/floor"] == 0.25
    assert row["optimizer/clipped_share"] == pytest.approx(2 / 3)
    assert row["optimizer/skipped_steps"] == 1
    assert row["loss_by_timestep/0250-0499"] == 1.0
    assert row["loss_by_timestep/0750-0999"] == 3.0


def test_what_wandb_is_asked_for_it_knows_and_the_rule_for_projects_is_its_own() -> None:
    import wandb

    here = Machine(pid=1, tree=True, gpus=[], node="n1", nodes=2, is_first=False)
    identity = Identity(
        folder=Path("/tmp"),
        run_id="a",
        project="p",
        name="n",
        group="g",
        job_type="train",
        tags=[],
        config={},
        machine=here,
    )
    for machine in (here, None):
        asked = dashboard.settings_of(replace(identity, machine=machine), print)
        taken = wandb.Settings(**asked)  # raises for one that it does not know
        assert {name: getattr(taken, name) for name in asked} == asked
    assert asked["x_disable_stats"]
    for name in ("a" * 128, "a" * 129, *(f"a{character}b" for character in string.punctuation + " ")):
        refused = []
        for check in (lambda n=name: wandb.Settings(project=n), TrackingSettings(project=name).check):
            try:
                check()
            except Exception:
                refused.append(check)
        assert len(refused) in (0, 2), name


def test_a_line_that_is_read_while_it_is_written_comes_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("a") as file:
        for written, steps in (('{"step": 1}\n{"st', [1]), ('ep": 2', []), ("}\n", [2]), ("", [])):
            file.write(written)
            file.flush()
            assert [line["step"] for line in tail.read()] == steps
    assert not tail.is_new
    path.with_name("new").write_text('{"step": 1}\n{"step": 3}\n')
    path.with_name("new").replace(path)  # as a new start does, which makes the lines after its checkpoint again
    assert [line["step"] for line in tail.read()] == [1, 3]
    assert tail.is_new
