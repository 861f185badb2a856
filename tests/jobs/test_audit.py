"""An audit computes a run again, and names the steps that are not what the code makes of the settings."""

import json
import shutil
from pathlib import Path

import pytest

from diffusion.errors import UserError
from jobs.audit.plan import plan
from jobs.storage.run_folder import RunFolder
from tests.launching import NO_FIGURES, TINY, done, finish, launch, start

TRAIN = ("train", "1d", *TINY, "--train.checkpoint-every", "20", "--device", "cpu", "--cluster", "local")
HERE = ("--device", "cpu", "--cluster", "local")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 50 steps in two shards that was trained on to 90, with another learning rate in each step therefore."""
    root = tmp_path_factory.mktemp("trained")
    settings = ("--train.steps", 50, "--train.warmup-steps", 5, "--train.grad-shards", 2)
    done(*TRAIN, *settings, "--name", "a", cwd=root, **NO_FIGURES)
    done("resume", "1d/a", "--train.steps", 90, *HERE, cwd=root, **NO_FIGURES)
    return root


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def steps_of(run: Path) -> tuple[list[int], list[int]]:
    """The steps of all checkpoints that were made, and of those that are kept. Slow disks make them a bit later."""
    made = [json.loads(line)["step"] for line in (run / "checkpoints.jsonl").read_text().splitlines()]
    return made, sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_a_run_is_what_the_code_makes_of_its_settings_though_most_checkpoints_are_gone(trained: Path) -> None:
    run = trained / "runs" / "1d" / "a"
    before, (made, kept) = files(run), steps_of(run)
    assert len(made) > len(kept) == 2 and 50 in made and made[-1] == 90
    ended = done("audit", "1d/a", *HERE, cwd=trained, plain=True)
    assert ended.out.splitlines() == [
        f"steps 0 to {kept[0]}: {len(made) - 1} checkpoints and {kept[0]} lines of metrics.jsonl are equal",
        f"steps {kept[0]} to 90: 1 checkpoint and {90 - kept[0]} lines of metrics.jsonl are equal",
        "Steps 0 to 90 are what this code makes of these settings.",
    ]
    assert files(run) == before


def test_one_flipped_bit_is_found_and_the_steps_after_it_are_right(tmp_path: Path) -> None:
    command = (*TRAIN, "--train.steps", 100, "--train.keep-checkpoints", 3, "--name", "a")
    ended = finish(start(*command, cwd=tmp_path, module="tests.jobs.flipped", FLIPPED_AT="45", **NO_FIGURES))
    assert ended.code == 0, ended
    found = launch("audit", "1d/a", *HERE, cwd=tmp_path)
    assert found.code == 1
    assert found.out.splitlines()[:-1] == [
        "steps 0 to 60: DIFFERENT",
        "  from step 45 on: metrics.jsonl (grad_norm)",
        "  equal at step 40, different at step 60: model.safetensors, ema.safetensors, optimizer.pt",
        "steps 60 to 80: 1 checkpoint and 20 lines of metrics.jsonl are equal",
        "steps 80 to 100: 1 checkpoint and 20 lines of metrics.jsonl are equal",
    ]


def test_an_older_run_is_audited_by_its_kept_checkpoints_and_another_machine_is_named(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    shutil.copytree(trained / "runs" / "1d", run.parent)
    (run / "checkpoints.jsonl").unlink()
    starts = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    (run / "timing.jsonl").write_text("".join(json.dumps({**line, "torch": "1.0"}) + "\n" for line in starts))
    kept = steps_of(trained / "runs" / "1d" / "a")[1][0]
    ended = done("audit", "1d/a", "--from", kept, "--gpus", 2, *HERE, cwd=tmp_path)
    same, machine, *_ = ended.out.splitlines()
    assert same == f"steps {kept} to 90: 1 checkpoint and {90 - kept} lines of metrics.jsonl are equal"
    assert f"from step {kept} on another machine: torch 1.0 before" in machine


@pytest.mark.parametrize(
    ("first", "last", "sentence"),
    [
        (50, None, r"--from must be a step that .* holds \(0, .*, 90\); got 50"),
        (0, 51, "--to must be a step of which .* has made a checkpoint, such as 50 and .*; got 51"),
        (90, None, "--from must be less than --to; got 90 and 90"),
    ],
)
def test_steps_without_a_checkpoint_are_refused(first: int, last: int | None, sentence: str, trained: Path) -> None:
    run = RunFolder(trained / "runs" / "1d" / "a")
    with pytest.raises(UserError, match=sentence):
        plan(run, run.read_experiment()[1], first, last, Path("unused"), print)


def test_more_processes_than_shards_are_refused(trained: Path) -> None:
    refused = launch("audit", "1d/a", "--gpus", 3, *HERE, cwd=trained)
    assert refused.code == 2
    assert "--gpus must not exceed the 2 shards of the run's gradient" in refused.err
