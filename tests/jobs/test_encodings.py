"""Text of others may have any encoding: it is kept or replaced, and stops nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.storage import ownership, provenance
from jobs.storage.records import Tail, read_jsonl
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from tests.launching import done
from tests.old_runs import ARCHIVES, unpack


def test_a_change_in_another_encoding_is_kept_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, git = tmp_path / "notes.txt", ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    file.write_bytes(b"tea\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    file.write_bytes(b"caf\xe9\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    written = json.dumps(provenance.describe())
    assert json.loads(written)["git_diff"].encode(errors="surrogateescape").endswith(b"-tea\n+caf\xe9\n")


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    Console(folder / "log.txt").log(f"Finished {folder}")
    assert (folder / "log.txt").read_text(encoding="utf-8") == f"Finished {tmp_path}/caf?\n"
    shown = done("status", "--runs-dir", tmp_path / "Läufe", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert shown.out == f"There are no runs in {tmp_path}/L?ufe.\n"


def test_a_report_of_a_run_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    run = unpack(ARCHIVES[0], "1d", folder, tmp_path)
    RunFolder(run).update_launch(argv=["launch.py", "train", "1d", "--runs-dir", str(folder)])
    done("report", run, cwd=tmp_path)
    assert f"{tmp_path}/caf\\udce9" in (run / "report.html").read_text()


def test_lines_that_a_power_cut_has_spoilt_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n{"step": 2}\n')
    assert read_jsonl(path) == Tail(path).read() == [{"step": 1}, {"step": 2}]


def test_a_holder_whose_name_is_no_text_is_found(tmp_path: Path) -> None:
    program = os.fsencode(tmp_path) + b"/sl\xe9ep"
    shutil.copy(shutil.which("sleep") or "", program)
    with ownership.sampling(tmp_path) as descriptor, subprocess.Popen([program, "60"], pass_fds=[descriptor]) as other:
        try:
            assert ownership.holders(tmp_path) == [os.getpid()]
        finally:
            other.kill()
