"""In a folder of a group, where the umask lets the group write, its members can do all that who started the run can.

Elsewhere others are told whose run it is.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.launching import NO_FIGURES, ROOT, TINY, Finished, done, sentence, status

GROUP = 4000
HERE = ("--device", "cpu", "--cluster", "local")


def as_user(user: int, cwd: Path, *arguments: object, **more: str) -> Finished:
    """Runs launch.py as a member of the group, who may read this project's folder and nothing else of root's."""
    caps = ("-all,+dac_read_search", "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    member = ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={GROUP}", "--bounding-set", *caps]
    command = [*member, "sh", "-c", 'umask 002; exec "$@"', "sh", sys.executable, ROOT / "launch.py", *arguments]
    own = {"HOME": str(cwd), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **own, **more}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return Finished(ended.returncode, ended.stdout, ended.stderr)


def test_members_watch_sample_and_continue_a_run(tmp_path: Path, no_plots: dict[str, str]) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o711)
    os.chown(tmp_path, 0, GROUP)
    tmp_path.chmod(0o2771)
    run = tmp_path / "runs" / "1d" / "a"
    for user, command in (
        (3001, ("train", "1d", *TINY, "--train.steps", 20, "--name", "a", *HERE)),
        (3002, ("status", "1d/a")),
        (3002, ("sample", "1d/a", "--num-samples", 10, *HERE)),
        (3002, ("resume", "1d/a", "--train.steps", 40, *HERE)),
    ):
        ended = as_user(user, tmp_path, *command, **no_plots, WANDB_MODE="offline" if user == 3001 else "disabled")
        assert ended.code == 0, ended
    assert (status(run)["state"], status(run)["step"]) == ("finished", 40)
    found = [path for path in run.rglob("*") if not path.is_symlink()]
    assert {path.stat().st_gid for path in found} == {GROUP}
    assert [path for path in found if path.stat().st_mode & 0o020 == 0] == []


def test_others_are_told_whose_run_it_is_and_change_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o711)
    done("train", "1d", *TINY, "--train.steps", 20, "--name", "a", *HERE, cwd=tmp_path, **NO_FIGURES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for command in (("sample", "1d/a"), ("resume", "1d/a", "--train.steps", 40), ("report", "1d/a")):
        ended = as_user(3003, tmp_path, *command)
        assert ended.code == 2, ended
        assert "runs/1d/a belongs to root, and you may not write to it" in sentence(ended.err)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
