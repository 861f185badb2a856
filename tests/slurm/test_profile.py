"""Profiles: what a site says, checked; and the shape of a job."""

from pathlib import Path

import pytest

from jobs.storage import provenance
from slurm import profile
from slurm.errors import UserError
from slurm.profile import Profile
from slurm.submit import Shape


def test_the_example_is_a_profile() -> None:
    example = profile.load("example", {"time_min": 30})
    assert (example.partition, example.gpus_per_node, example.time_min) == ("gpu", 4, 30)
    assert example.setup == ("module purge",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin = 'gpu'", "partitoin is no key of a profile; they are partition"),
        ("time_min = 'long'", "time_min must be a number; got 'long'"),
        ("time_min = true", "time_min must be a number; got True"),
        ("poll_s = 0", "slurm.poll-s must be at least 1; got 0"),
        ("time_min = 0", "slurm.time-min must be at least 1; got 0"),
        ("partition = 3", "partition must be a string; got 3"),
        ("setup = 'module load cuda'", "setup must be a list of strings"),
        ("[environment]\nA = 1", "environment must be a table of strings"),
        ("partition = ", "cannot be read"),
    ],
)
def test_a_wrong_key_or_value_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words.replace(".", r"\.").replace("'", ".")):
        profile.load(str(path), {})


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="example; got nonsense"):
        profile.load("nonsense", {})


def test_the_default_profile_is_the_first_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, partition: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"partition = '{partition}'")
        return path

    monkeypatch.delenv("DIFFUSION_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(profile, "FOLDER", tmp_path / "profiles")
    found = [profile.load(None, {}).partition]
    write(tmp_path / "config" / "diffusion-launcher" / "default.toml", "own")
    found.append(profile.load(None, {}).partition)
    write(tmp_path / "profiles" / "default.toml", "checkout")
    found.append(profile.load(None, {}).partition)
    write(tmp_path / "profiles" / "west.toml", "west")
    monkeypatch.setenv("DIFFUSION_PROFILE", "west")
    found.append(profile.load(None, {}).partition)
    monkeypatch.setenv("DIFFUSION_PROFILE", str(write(tmp_path / "east.toml", "east")))
    found.append(profile.load(None, {}).partition)
    found.append(profile.load("default", {}).partition)
    assert found == [None, "own", "checkout", "west", "east", "checkout"]
    monkeypatch.setenv("DIFFUSION_PROFILE", "")
    assert profile.load(None, {}) == Profile()
    monkeypatch.setenv("DIFFUSION_PROFILE", "nonsense")
    with pytest.raises(UserError, match="DIFFUSION_PROFILE must be a TOML file or one of default, west; got nonsense"):
        profile.load(None, {})


def test_a_profile_is_no_code_so_that_a_run_need_not_copy_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    for name in provenance.CODE:
        if name.endswith(".py"):
            (root / name).write_text("")
        else:
            (root / name / "profiles").mkdir(parents=True)
            (root / name / "code.py").write_text("")
    monkeypatch.setattr(provenance, "ROOT", root)
    provenance.save_code(tmp_path / "code")
    (root / "slurm" / "profiles" / "default.toml").write_text("time_min = 30")
    assert provenance.code_folder(tmp_path) == tmp_path / "code"
    (root / "slurm" / "code.py").write_text("changed = True")
    assert provenance.code_folder(tmp_path) != tmp_path / "code"


def test_overrides_are_checked_too() -> None:
    with pytest.raises(UserError, match="gpus-per-node must be at least 1; got 0"):
        profile.load(None, {"gpus_per_node": 0})


@pytest.mark.parametrize(("gpus", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (8, (2, 4)), (12, (3, 4))])
def test_gpus_become_nodes_and_tasks(gpus: int, shape: tuple[int, int]) -> None:
    assert Shape.of(gpus, 4) == Shape(*shape)


@pytest.mark.parametrize("gpus", [5, 6, 7, 9])
def test_nodes_must_be_filled(gpus: int) -> None:
    with pytest.raises(UserError, match=f"multiple of gpus_per_node=4 where it takes several nodes; got {gpus}"):
        Shape.of(gpus, 4)
