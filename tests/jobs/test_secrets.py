"""Keys of the environment, a netrc and a proxy are nowhere in what is printed, written, submitted or tracked."""

import os
import pickle
from pathlib import Path

import pytest

from jobs.tracking.dashboard import Wandb
from jobs.tracking.server import public
from jobs.train.job import TrainJob
from slurm.profile import Profile
from slurm.submit import Submission
from slurm.task import SlurmTask
from tests.launching import NO_FIGURES, TINY, launch

KEY = "KEYSECRET0" * 4
NOWHERE = "127.0.0.1:9"
ENVIRONMENT = {
    "WANDB_API_KEY": KEY,
    "WANDB_BASE_URL": f"http://me:URLSECRET@{NOWHERE}",
    **dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), f"http://me:PROXYSECRET@{NOWHERE}"),
    "PIP_INDEX_URL": f"http://me:INDEXSECRET@{NOWHERE}/simple",
    "HF_TOKEN": "TOKENSECRET",
}


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_run_holds_no_secret(mode: str, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {40 * 'N'}ETRCSECRET\n")
    env = {**ENVIRONMENT, "WANDB_MODE": "", "NETRC": str(tmp_path / "netrc")}
    small = (*TINY, "--train.steps", 20, "--name", "a", "--device", "cpu", "--tracking.mode", mode)
    commands: list[tuple[object, ...]] = [("train", "1d", *small)]
    if mode == "auto":
        commands += [("sample", "1d/a", "--num-samples", 10), ("report", "1d/a")]
        commands += [("train", "mnist-small", "--data.root", tmp_path / "data"), ("status", "1d/a", "--json")]
    said = [launch(*command, cwd=tmp_path, **env, **NO_FIGURES) for command in commands]
    assert [ended.code for ended in said] == [0, 0, 0, 2, 0][: len(said)], said
    assert "wandb" in said[0].out  # it has had something to say
    assert "SECRET" not in "".join(ended.out + ended.err for ended in said)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"]
    assert [path for path in files if b"SECRET" in path.read_bytes()] == []


class Sent:
    """wandb's run, of which only the sent lines and alerts are looked at."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write_logs(self, lines: str) -> None:
        self.texts.append(lines)

    def alert(self, *, text: str, **_: object) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("secret", ["me", "me:p", "me:p@ss", "me:pa/ss", "me@x:p/a@ss", ":p"])
def test_an_address_loses_its_user_and_password(secret: str) -> None:
    line = "GET http://{}host:80/a, then mail b@c.d or https://e/f@g (step 3)\n"
    printed, sent = line.format(f"{secret}@"), Sent()
    assert public(printed) == line.format("")
    shown = Wandb.__new__(Wandb)
    shown._run = sent
    shown.write(printed)
    shown.alert("a has failed", printed, "ERROR")
    assert sent.texts == [line.format("")] * 2


def test_what_is_submitted_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    job = TrainJob(tmp_path, 2, "cpu")
    submission = Submission("a", [job], Profile(), 2, on_gpus=False, folder=tmp_path, code=tmp_path)
    assert "SECRET" not in submission.script()
    assert b"SECRET" not in pickle.dumps(SlurmTask(job, 60))
    assert os.environ["WANDB_API_KEY"] == KEY
