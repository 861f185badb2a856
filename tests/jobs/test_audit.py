"""An audit computes a run again, and names the steps that are not what the code makes of the settings."""

import json
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.errors import OutsideError, UserError
from jobs.audit import compute, report
from jobs.audit.plan import Audit, plan
from jobs.health import gpu_test
from jobs.health.watchdog import Watchdog
from jobs.runtime.job import MachineError
from jobs.runtime.signals import SignalWatch
from jobs.runtime.world import start as start_world
from jobs.storage.run_folder import RunFolder
from tests.jobs import parallel
from tests.launching import NO_FIGURES, TINY, done, finish, launch, slowed, start, wait_until

pytestmark = pytest.mark.processes  # which train the run that all tests share

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


def test_an_older_run_is_audited_by_its_kept_checkpoints_and_another_torch_is_named(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    shutil.copytree(trained / "runs" / "1d", run.parent)
    (run / "checkpoints.jsonl").unlink()
    starts = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    (run / "timing.jsonl").write_text("".join(json.dumps({**line, "torch": "1.0"}) + "\n" for line in starts))
    kept = steps_of(trained / "runs" / "1d" / "a")[1][0]
    ended = done("audit", "1d/a", "--from", kept, "--gpus", 2, *HERE, cwd=tmp_path)
    same, said, *_ = ended.out.splitlines()
    assert same == f"steps {kept} to 90: 1 checkpoint and {90 - kept} lines of metrics.jsonl are equal"
    assert f"from step {kept} on bytes may differ: torch 1.0 before" in said


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


def planned(root: Path, folder: Path, **today: int) -> Audit:
    """An audit of the run, whose settings have been changed since it was trained."""
    run = RunFolder(root / "runs" / "1d" / "a")
    config = run.read_experiment()[1]
    return plan(run, replace(config, train=replace(config.train, **today)), 0, None, folder, print)  # type: ignore[arg-type]


def test_what_a_start_has_set_is_not_taken_from_today(trained: Path, tmp_path: Path) -> None:
    first = planned(trained, tmp_path, grad_shards=4).stretches[0].parts[0]
    assert (first.config.train.grad_shards, first.config.train.steps, first.is_known) == (2, 50, True)


def test_a_start_that_took_some_examples_at_a_time_is_computed_in_more_shards(trained: Path, tmp_path: Path) -> None:
    """Which are what older versions' micro batches have become."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    timing = tmp_path / "runs" / "1d" / "a" / "timing.jsonl"
    lines = [json.loads(line) for line in timing.read_text().splitlines()]
    starts = [line for line in lines if line.get("event") == "start"]
    for begun, most in zip(starts, (10, None), strict=True):
        begun["micro_batch_size"] = most
    timing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [part for stretch in planned(tmp_path, tmp_path).stretches for part in stretch.parts]
    assert [part.config.train.grad_shards for part in parts] == [8, *[2] * (len(parts) - 1)]


def test_a_start_without_its_settings_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    timing = tmp_path / "runs" / "1d" / "a" / "timing.jsonl"
    lines = [json.loads(line) for line in timing.read_text().splitlines()]
    for line in lines:
        line.pop("steps", None)
    timing.write_text("".join(json.dumps(line) + "\n" for line in lines))
    audit = planned(tmp_path, tmp_path / "audit")
    audit.folder.mkdir()
    said = report.conclude(audit)[1].splitlines()
    assert said[1] == "  the settings of the start at step 0 were not recorded: it is computed with today's"
    assert [line for line in said if "step 50 were not recorded" in line] == []


def test_what_an_audit_has_found_is_told_whatever_the_folder_is_called_and_takes(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    audit = planned(tmp_path, tmp_path / "audit\udcff")
    audit.folder.mkdir()
    equal, text = report.conclude(audit)
    assert not equal and text.endswith(f"What was computed is in {audit.folder}.")
    written = audit.folder / "report.txt"
    assert written.read_text().endswith(f"What was computed is in {tmp_path}/audit\\udcff.\n")
    written.unlink()
    written.mkdir()  # which no file replaces
    assert report.conclude(audit) == (False, f"{text}\nThis is not kept: {written}: Is a directory")


@pytest.mark.parametrize("harm", ["the run deletes it", "the disk takes no more"])
def test_a_checkpoint_that_cannot_be_copied_leaves_nothing(harm: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    audit = planned(tmp_path, tmp_path / "audit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if harm == "the run deletes it":
        shutil.rmtree(tmp_path / "runs" / "1d" / "a" / "checkpoints")
        rule = "the run has just deleted .*; start the audit again"
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        rule = "step-.* cannot be copied: .*File too large"
    try:
        with pytest.raises(OutsideError, match=rule):
            audit.begin(at_once=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not audit.folder.exists()


def test_an_audit_that_the_disk_has_no_room_for_is_refused(trained: Path, tmp_path: Path) -> None:
    audit = planned(trained, tmp_path / "runs" / "audit" / "a")
    with pytest.raises(UserError, match=rf"this audit need .* GB of disk; .* GB are free in {tmp_path}$"):
        audit.begin(at_once=10**15)
    assert list(tmp_path.iterdir()) == []


def test_no_two_audits_have_one_folder(trained: Path, tmp_path: Path) -> None:
    audit = planned(trained, tmp_path / "audit")
    audit.begin(at_once=1)
    with pytest.raises(FileExistsError):
        audit.begin(at_once=1)
    assert list(audit.folder.rglob("step-*"))


def test_an_audit_that_is_stopped_leaves_no_copies(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs" / "1d", tmp_path / "runs" / "1d")
    process = start("audit", "1d/a", *HERE, cwd=tmp_path, **slowed("jobs.audit.compute", "run_steps", 5))
    audits = tmp_path / "runs" / "audit"
    wait_until(lambda: any(audits.rglob("step-*")))
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert not any(audits.rglob("step-*"))


def test_a_gpu_that_computes_wrongly_audits_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu_test.check
    monkeypatch.setattr(gpu_test, "check", lambda device: check(torch.device("cuda")))
    monkeypatch.setattr(gpu_test, "fault_of", lambda device, seconds: "it computes wrongly")
    monkeypatch.setattr(compute, "start", lambda processes, device, precision: start_world(1, "cpu", precision))
    stretch = planned(trained, tmp_path).stretches[0]
    with SignalWatch() as signals, pytest.raises(MachineError, match="must not be used: it computes wrongly"):
        compute.compute(stretch, 1, "cuda", signals, Watchdog(tmp_path))


def test_processes_wait_as_long_as_a_save_may_take(tmp_path: Path) -> None:
    outcome, err = parallel.run(parallel.AuditSaveJob(tmp_path, 2), 2)
    assert outcome.exit_code == 0, err
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[[1], "saving"]] * 2
