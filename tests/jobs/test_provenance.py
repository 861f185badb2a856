"""A run keeps a copy of the code: of the files alone, without their modes. What cannot be copied is named."""

import os
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from commands.train import create
from diffusion.errors import UserError
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import provenance
from jobs.storage.run_folder import RunFolder


def test_of_many_jobs_that_are_noted_at_once_none_is_forgotten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    ids = [str(number) for number in range(40)]
    with ThreadPool(8) as pool:  # each opens the lock's file for itself, as processes do
        pool.map(lambda job_id: run.add_job("sample_job_ids", job_id), ids)
    assert sorted(run.read_launch()["sample_job_ids"]) == sorted(ids)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of code that may be changed."""
    root = tmp_path / "project"
    (root / "slurm" / "devcluster").mkdir(parents=True)
    for name in ("launch.py", "slurm/place.py", "slurm/devcluster/site.toml"):
        (root / name).write_text(name)
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def test_the_umask_says_who_may_change_a_copy(code: Path, tmp_path: Path) -> None:
    (code / "slurm" / "place.py").chmod(0o400)
    (code / "slurm").chmod(0o500)
    before = os.umask(0o002)
    try:
        provenance.save_code(tmp_path / "code")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "code").rglob("*")}
    assert modes == {0o664, 0o775}
    assert provenance.code_folder(tmp_path) == tmp_path / "code"


def test_a_link_that_leads_nowhere_is_left_out(code: Path, tmp_path: Path) -> None:
    (code / "slurm" / "devcluster" / "gone.toml").symlink_to("/nowhere")
    provenance.save_code(tmp_path / "code")
    assert [path.name for path in (tmp_path / "code" / "slurm" / "devcluster").iterdir()] == ["site.toml"]
    assert provenance.code_folder(tmp_path) == tmp_path / "code"


def test_a_file_that_cannot_be_read_is_named(code: Path, tmp_path: Path) -> None:
    path = code / "slurm" / "devcluster" / "mine.toml"
    path.write_text("")
    path.chmod(0)
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    run.path.parent.mkdir(parents=True)
    run.path.parent.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents and not folder.stat().st_mode & 0o001:  # which pytest has made
            folder.chmod(0o711)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"1d/a cannot be made: .*/slurm/devcluster/mine\.toml: Permission denied"):
            create(run, "1d", EXPERIMENTS["1d"].preset, {})
    finally:
        os.seteuid(0)
    assert list(run.path.parent.iterdir()) == []
