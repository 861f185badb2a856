"""Checkpoints are whole, verified, and never lost to what can happen to a disk."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.errors import UserError
from diffusion.settings import SettingsError
from jobs.experiments.settings import TrainSettings
from jobs.files import write_json
from jobs.runtime.job import failure_of
from jobs.storage import checkpoints
from jobs.storage.checkpoints import CorruptCheckpoint, Snapshot
from jobs.storage.run_folder import RunFolder


def snapshot(step: int) -> Snapshot:
    weights = {"a.weight": torch.full((3, 4), float(step)), "b": torch.arange(5.0)}
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Snapshot(step, weights, {name: value / 2 for name, value in weights.items()}, optimizer)


def ours() -> None:
    """The run is ours."""


def save(folder: Path, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    for step in steps:
        checkpoints.save(folder, snapshot(step), ours)


def truncate(path: Path) -> None:
    os.truncate(path / "ema.safetensors", 10)


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "model.safetensors").write_bytes(content)


def delete_a_file(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


def garble_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"step": 30, "files": {"model.safetensors": 3}}')


def delete_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def swap_with_another(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000020"), path)


DAMAGES = [
    truncate,
    flip_a_byte,
    delete_a_file,
    empty_the_manifest,
    garble_the_manifest,
    delete_the_manifest,
    swap_with_another,
]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    assert checkpoints.newest(tmp_path, pytest.fail) == 7
    loaded, saved = checkpoints.load(tmp_path, 7), snapshot(7)
    assert loaded.step == 7
    for name, value in saved.model.items():
        assert torch.equal(loaded.model[name], value)
        assert torch.equal(loaded.ema[name], value / 2)
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    save(tmp_path / "a", 7)
    save(tmp_path / "b", 3, 7)
    for name in (*checkpoints.FILES, "manifest.json"):
        assert (tmp_path / "a/step-00000007" / name).read_bytes() == (tmp_path / "b/step-00000007" / name).read_bytes()


def test_a_checkpoint_that_is_still_read_on_nfs_keeps_no_other_from_being_saved_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2, 3)

    def refuse(*arguments: object, **more: object) -> None:  # a deleted file that is read has another name there
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", refuse)
        save(tmp_path, 3)  # by a run that had gone back to step 2
        checkpoints.prune(tmp_path, 1)
        (still_read,) = tmp_path.glob(".step-00000003.*")
        (still_read / ".nfs1").touch()
        save(tmp_path, 4)
        checkpoints.prune(tmp_path, 1)  # the other one of step 3
    assert checkpoints.newest(tmp_path, pytest.fail) == 4
    assert checkpoints.steps(tmp_path) == [4]
    checkpoints.clean(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000004"]


def test_a_checkpoint_that_cannot_be_deleted_is_told_and_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    unlink = os.unlink

    def refuse(path: str, **more: object) -> None:
        if path == "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, **more)  # type: ignore[arg-type]

    writer = checkpoints.Writer(tmp_path, 1, 0, ours, said.append)
    monkeypatch.setattr(os, "unlink", refuse)
    for step in (1, 2, 3):
        writer.write(snapshot(step))
        writer.wait()
    assert (writer.newest, checkpoints.steps(tmp_path)) == (3, [3])
    assert said == ["WARNING: older checkpoints could not be deleted: [Errno 5] Input/output error"] * 2


@pytest.mark.parametrize("on", ["Linux", "macOS"])
@pytest.mark.parametrize("name", ["zü".encode(), b"r\xff"])
def test_neither_bytes_nor_reading_depend_on_the_name_of_the_folder(
    name: bytes, on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on == "macOS":
        monkeypatch.setattr(checkpoints, "OPEN_FILES", tmp_path / "proc")
    other = tmp_path / os.fsdecode(name)
    save(tmp_path / "zu", 7)
    save(other, 7)
    for file in (*checkpoints.FILES, "manifest.json"):
        assert (other / "step-00000007" / file).read_bytes() == (tmp_path / "zu/step-00000007" / file).read_bytes()
    assert checkpoints.newest(other, pytest.fail) == 7
    loaded = checkpoints.load(other, 7)
    assert loaded.optimizer["param_groups"] == snapshot(7).optimizer["param_groups"]
    assert all(torch.equal(loaded.model[name], value) for name, value in snapshot(7).model.items())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_is_used(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "step-00000030")
    with pytest.raises(CorruptCheckpoint, match="step-00000030"):
        checkpoints.verify(tmp_path, 30)
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) == 20
    assert len(said) == 1
    assert "step-00000030" in said[0]
    checkpoints.set_aside(tmp_path, newer_than=20)
    assert checkpoints.steps(tmp_path) == [20, 10]
    assert (tmp_path / "corrupt-step-00000030").is_dir()


def test_to_begin_anew_is_for_a_person_to_decide(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for step in (10, 20):
        flip_a_byte(tmp_path / f"step-{step:08d}")
    said: list[str] = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is good; to begin anew, move them away"):
        checkpoints.newest(tmp_path, said.append)
    assert len(said) == 2
    assert checkpoints.steps(tmp_path) == [20, 10]


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path) -> None:
    """A glob would find nothing in it, and the run would begin anew."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        checkpoints.steps(loop)
    assert checkpoints.steps(tmp_path / "none") == []


def test_a_folder_that_is_out_of_reach_is_not_begun_anew(tmp_path: Path) -> None:
    """A link to a file system that this node has not mounted, or one that somebody has emptied."""
    there, link = tmp_path / "scratch", tmp_path / "run" / "checkpoints"
    there.mkdir()
    link.parent.mkdir()
    link.symlink_to(there)
    assert checkpoints.newest(link, pytest.fail) is None  # nothing was saved yet
    save(link, 10, 20)
    there.rename(tmp_path / "unmounted")
    expected = f"{link} leads to {there}, which is not there, though step 20 was saved in it; to begin anew, make"
    with pytest.raises(UserError, match=expected) as raised:
        checkpoints.newest(link, pytest.fail)
    assert failure_of(raised.value, "").outside  # so it is tried again, perhaps on another node
    link.unlink()
    with pytest.raises(UserError, match=f"{link} is not there, though step 20"):
        checkpoints.newest(link, pytest.fail)
    link.mkdir()  # as the sentence says
    assert checkpoints.newest(link, pytest.fail) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_is_not_damaged(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoints, "sha256", refuse)
    with pytest.raises(UserError, match=rf"step-00000010 cannot be read: {os.strerror(number)}") as raised:
        checkpoints.newest(tmp_path, pytest.fail)
    assert not isinstance(raised.value, CorruptCheckpoint)


def test_the_umask_says_who_may_read_a_checkpoint(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        save(tmp_path, 10)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000010").iterdir()} == {0o664}


def test_a_half_written_checkpoint_is_invisible_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 10)
    left = tmp_path / ".step-00000020.1234.tmp"
    shutil.copytree(tmp_path / "step-00000010", left)
    assert checkpoints.newest(tmp_path, pytest.fail) == 10
    checkpoints.clean(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000010"]


def test_a_checkpoint_gets_its_name_when_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, list[int]]] = []

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, checkpoints.steps(tmp_path)))

    monkeypatch.setattr(os, "fsync", sync)
    save(tmp_path, 10)
    for file in (tmp_path / "step-00000010").iterdir():
        assert (file.stat().st_ino, []) in synced, file
    assert synced[-1] == (tmp_path.stat().st_ino, [10])  # then its name in the folder


def test_a_checkpoint_that_is_being_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, 20, 30)
    delete, seen = shutil.rmtree, []

    def look_and_delete(path: Path, **more: object) -> None:
        seen.append(checkpoints.steps(tmp_path))
        delete(path, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(shutil, "rmtree", look_and_delete)
    checkpoints.prune(tmp_path, 2)
    assert seen == [[30, 20]]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40)
    checkpoints.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000030", "step-00000040"]


def test_a_checkpoint_that_samples_are_still_drawn_from_is_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name, step, complete in (("waits", 10, False), ("is drawn", 20, True)):
        write_json(made(run.samples / name) / "manifest.json", {"step": step, "complete": complete})
    (made(run.samples / "is damaged") / "manifest.json").write_text("{")
    writer = checkpoints.Writer(run.checkpoints, 2, 0, ours, pytest.fail, run.drawn_steps)
    for step in (10, 20, 30, 40):
        writer.write(snapshot(step))
    writer.wait()
    assert checkpoints.steps(run.checkpoints) == [40, 30, 10]


def test_the_first_checkpoint_after_each_multiple_is_kept_for_good(tmp_path: Path) -> None:
    def needed() -> set[int]:
        return checkpoints.firsts(checkpoints.steps(tmp_path), 20)

    writer = checkpoints.Writer(tmp_path, 2, 0, ours, pytest.fail, needed)
    for step in (4, 10, 21, 30, 34, 40, 41, 50, 83, 90):  # one was late, and none was written between 60 and 80
        writer.write(snapshot(step))
    writer.wait()
    assert checkpoints.steps(tmp_path) == [90, 83, 40, 21]
    assert checkpoints.firsts([10, 20], 0) == set()


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """The folder of checkpoints of a run whose held-out loss is lowest at step 20."""
    losses = {5: 0.1, 10: 0.4, 20: 0.2, 30: 0.3, 40: None, 60: 0.9}
    lines = [{"step": step, "held_out_loss": loss} for step, loss in losses.items()]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 61, "loss": 0.0}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 62, "held_out_loss": 0.0')  # cut by a kill
    return tmp_path / "checkpoints"


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(measured: Path) -> None:
    writer = checkpoints.Writer(measured, 2, 0, ours, pytest.fail, lambda: checkpoints.lowest(measured))
    found = []
    for step in (3, 11, 22, 25, 30, 44, 60):  # the first has no loss, 22 and 25 have that of 20
        writer.write(snapshot(step))
        writer.wait()
        found.append((checkpoints.steps(measured), checkpoints.lowest(measured)))
    # A writer that begins anew, after a kill, knows no less.
    checkpoints.Writer(measured, 2, 60, ours, pytest.fail, lambda: checkpoints.lowest(measured)).write(snapshot(70))
    assert found == [
        ([3], set()),
        ([11, 3], {11}),
        ([22, 11], {22}),
        ([25, 22], {22}),
        ([30, 25, 22], {22}),
        ([44, 30, 22], {22}),
        ([60, 44, 22], {22}),
    ]
    assert checkpoints.choose(measured, "best", pytest.fail)[0] == 22


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_who_does_not_own_the_run_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10)

    def taken_over() -> None:
        raise PermissionError("taken over")

    with pytest.raises(PermissionError):
        checkpoints.save(tmp_path, snapshot(20), taken_over)
    assert os.listdir(tmp_path) == ["step-00000010"]


def test_the_writer_reports_a_refusing_disk_and_writes_the_next_one(tmp_path: Path) -> None:
    said: list[str] = []
    refuse = True

    def may_write() -> None:
        if refuse:
            raise OSError(28, "No space left on device")

    writer = checkpoints.Writer(tmp_path, 2, 0, may_write, said.append)
    writer.write(snapshot(10))
    writer.wait()
    assert "No space left" in said[0]
    assert writer.newest == 0
    refuse = False
    writer.write(snapshot(20))
    writer.wait()
    assert (writer.newest, checkpoints.steps(tmp_path)) == (20, [20])


@pytest.mark.parametrize("full_at", ["model", "ema", "optimizer"])
def test_the_writer_reports_a_disk_that_is_full_in_the_middle(full_at: str, tmp_path: Path) -> None:
    """Each library has its own word for that."""
    big, small = {"w": torch.zeros(100_000)}, {"w": torch.zeros(10)}
    sizes = {name: big if name == full_at else small for name in ("model", "ema", "optimizer")}
    said: list[str] = []
    writer = checkpoints.Writer(tmp_path, 2, 0, ours, said.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        writer.write(Snapshot(10, **sizes))  # type: ignore[arg-type]
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "WARNING: a checkpoint could not be written" in said[0]
    assert os.listdir(tmp_path) == []
    writer.write(Snapshot(20, **sizes))  # type: ignore[arg-type]
    writer.wait()
    assert checkpoints.steps(tmp_path) == [20]


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    torch.save({"state": Malicious()}, tmp_path / "step-00000010" / "optimizer.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load(tmp_path, 10)
    assert not marker.exists()


def test_hashes_of_checkpoints_outlive_them_and_a_step_that_is_made_again_has_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 10, 20, 30)
    recorded = checkpoints.verify(folder, 10)["files"]
    checkpoints.prune(folder, keep=1)
    save(folder, 20)
    lines = (tmp_path / "checkpoints.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
    assert checkpoints.ledger(folder)[10] == {name: facts["sha256"] for name, facts in recorded.items()}


def test_a_step_that_comes_out_otherwise_is_told_and_what_had_followed_no_longer_counts(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", list[str]()
    save(folder, 10, 20, 30)
    before = checkpoints.ledger(folder)
    with (tmp_path / "checkpoints.jsonl").open("a") as file:
        file.write('{"step": 40, "sha')  # as a disk leaves it that is full
    other = snapshot(20)
    other.model["b"][0] = 7
    writer = checkpoints.Writer(folder, 3, 10, ours, said.append)
    writer.write(other)
    writer.wait()
    assert said == ["WARNING: step 20 was made again and is not what checkpoints.jsonl says: other bytes"]
    after = checkpoints.ledger(folder)
    assert after[20]["model.safetensors"] != before[20]["model.safetensors"]
    assert after[20]["ema.safetensors"] == before[20]["ema.safetensors"]
    shutil.rmtree(folder)
    assert sorted(checkpoints.ledger(folder)) == [10, 20]


def test_what_a_run_has_gone_back_on_no_longer_counts_though_none_of_its_steps_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 10, 20, 30)
    known = checkpoints.ledger(folder)
    checkpoints.set_aside(folder, newer_than=30)
    assert checkpoints.ledger(folder) == known
    checkpoints.set_aside(folder, newer_than=10)
    assert sorted(checkpoints.ledger(folder)) == [10]
    save(folder, 20, 40)
    assert checkpoints.ledger(folder).keys() == {10, 20, 40}
    assert checkpoints.ledger(folder)[20] == known[20]


def test_best_is_for_runs_with_a_held_out_loss(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 10)
    with pytest.raises(UserError, match="needs a checkpoint with a held-out loss"):
        checkpoints.choose(tmp_path / "checkpoints", "best", pytest.fail)
    with pytest.raises(SettingsError, match=r"keep-best needs train.held-out-every to be at least 1; got 0"):
        TrainSettings(steps=1, batch_size=1, lr=1, keep_best=True)
