"""Sampling jobs write exactly the samples asked for, the same bytes however they are run."""

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion.errors import UserError
from diffusion.settings import SamplerSettings
from jobs.health.watchdog import VARIABLE
from jobs.runtime import compiling
from jobs.runtime.job import JobError
from jobs.runtime.signals import SignalWatch, Stop, Stopped
from jobs.sample import draw, sample_set
from jobs.sample.job import SampleJob, SampleMergeJob
from jobs.storage import faults
from jobs.storage.run_folder import RunFolder
from tests.held import AFTER_SHARD, held, let_go, start_held
from tests.launching import NO_FIGURES, TINY, done, finish, interrupt, launch, relatives, sentence, wait_until, workers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Path:
    """A folder with a 1D run and a tiny MNIST run, both trained for a moment."""
    root = tmp_path_factory.mktemp("trained")
    done("train", "1d", *TINY, "--train.steps", "50", "--name", "a", cwd=root, **NO_FIGURES)
    small = ("--model.dim", "8", "--train.batch-size", "4", "--train.steps", "3", "--name", "a")
    done("train", "mnist-small", *small, cwd=root, MNIST_ROOT=str(mnist_root), **NO_FIGURES)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of what has gone wrong."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != faults.FILE}


SETTINGS = sample_set.SampleSettings(50, "ema", "", SamplerSettings(sampler="ddim", steps=2), 0, "fp32", 1024, 65536)
COMMANDS = {
    "1d": ("--num-samples", "200001", "--sampler", "dpm++", "--steps", "5"),
    "mnist-small": ("--num-samples", "600", "--sampler", "ddim", "--steps", "2", "--eta", "0.5"),
}


@pytest.mark.parametrize("experiment", COMMANDS)
def test_any_number_of_processes_writes_the_same_bytes(experiment: str, root: Path) -> None:
    folder = root / "runs" / experiment / "a" / "samples"
    for processes in (1, 2, 4):
        where = ("--device", "cpu", "--gpus", processes, "--name", f"by-{processes}")
        done("sample", f"{experiment}/a", *COMMANDS[experiment], *where, cwd=root)
    assert contents(folder / "by-1") == contents(folder / "by-2") == contents(folder / "by-4")
    array = np.load(folder / "by-1" / "samples.npz")["arr_0"]
    if experiment == "1d":
        assert (array.shape, array.dtype) == ((200_001,), np.float32)
        assert len(np.unique(array)) > 190_000  # nothing is drawn twice, but for chance in 32 bits
    else:
        assert (array.shape, array.dtype) == ((600, 28, 28, 1), np.uint8)
        assert len({image.tobytes() for image in array}) == 600


@pytest.mark.parametrize("change", ["flip a byte", "delete"])
def test_a_job_draws_with_the_weights_that_were_planned(change: str, root: Path) -> None:
    """A job may run hours after its checkpoint has been verified."""
    done("sample", "1d/a", "--num-samples", 10, "--name", "s", cwd=root, **NO_FIGURES)
    run = RunFolder(root / "runs" / "1d" / "a")
    samples = sample_set.read(run, "s")
    path = run.checkpoints / "step-00000050" / "ema.safetensors"
    path.with_name("optimizer.pt").unlink()  # it is not asked for
    draw.load_model(run, samples.settings, torch.device("cpu"))
    if change == "delete":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(JobError, match=r"ema\.safetensors is not the file that these samples are drawn with"):
        draw.load_model(run, samples.settings, torch.device("cpu"))


def test_each_shard_is_drawn_by_one_of_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    monkeypatch.setenv(VARIABLE, "0")  # nobody looks on
    target = SimpleNamespace(folder=tmp_path, has_shard=lambda shard: False)
    monkeypatch.setattr(draw, "sample", lambda samples, shards, *rest, **options: drawn.append(shards))
    job = SampleJob(target=target, shards=(0, 1, 4, 5, 6, 8), processes=4, device="cpu", merge=False)  # type: ignore[arg-type]
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        assert job.work(SignalWatch()) == 0
    assert drawn == [[0, 6], [1, 8], [4], [5]]


FOUR_SHARDS = ("sample", "1d/a", "--num-samples", "200000", "--sampler", "ddim", "--steps", "3")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_job_goes_on_with_what_is_missing(processes: int, root: Path) -> None:
    folder = root / "runs" / "1d" / "a" / "samples"
    done(*FOUR_SHARDS, "--name", "whole", cwd=root, **NO_FIGURES)
    where = ("--name", "killed", "--device", "cpu", "--gpus", processes)
    process = start_held(AFTER_SHARD, 1, *FOUR_SHARDS, *where, cwd=root)
    os.kill(held(root), signal.SIGKILL)
    assert finish(process).code != 0
    wait_until(lambda: not relatives(process))
    before = {path: path.stat().st_mtime_ns for path in (folder / "killed").glob("shard-*.npy")}
    assert 1 <= len(before) < 4
    done(*FOUR_SHARDS, *where, cwd=root, **NO_FIGURES)
    assert contents(folder / "killed") == contents(folder / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_job_with_a_budget_goes_on_by_itself(root: Path) -> None:
    folder = root / "runs" / "1d" / "a" / "samples"
    done(*FOUR_SHARDS, "--name", "whole", cwd=root, **NO_FIGURES)
    where = ("--name", "killed", "--device", "cpu", "--retries", 1)
    process = start_held(AFTER_SHARD, 1, *FOUR_SHARDS, *where, cwd=root, times=2)
    victim = held(root)
    before = {path: path.stat().st_mtime_ns for path in (folder / "killed").glob("shard-*.npy")}
    for number in range(2):  # a new shard between makes the budget whole again
        os.kill(victim if number == 0 else held(root, number), signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended
    assert ended.err.count("process 0 was ended by SIGKILL. The job is tried again.") == 2
    assert contents(folder / "killed") == contents(folder / "whole")
    assert len(before) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_fault_that_repeats_without_progress_ends_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's until the budget is used up; the code's at the second time, whatever other shares have done."""
    asked = sample_set.SampleSet(tmp_path, "s", SETTINGS, 200_000, 4)
    asked.write_manifest()
    jobs = [SampleJob(asked, (shard,), 1, "cpu", merge=False, retries=2) for shard in range(4)]

    def end(job: SampleJob, error: Exception | None, cause: str | None = None) -> bool:
        def fail(*arguments: object, **options: object) -> None:
            assert error is not None
            raise error

        monkeypatch.setattr(draw, "sample", fail)
        if error is not None:
            assert job.work(SignalWatch()) == 1
        return job.try_again_after(cause, "n1", lambda left_out: "17_0", "17_0")

    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setattr(asked.__class__, "job_ids", lambda self: ["17"])
    assert [end(jobs[0], OSError(5, "Input/output error")) for _ in range(3)] == [True, True, False]
    assert [end(jobs[1], ValueError("why")) for _ in range(2)] == [True, False]
    assert not end(jobs[2], JobError("the weights are gone"))
    assert end(jobs[3], None, "task 0 was ended: Killed")
    only_merges = SampleJob(asked, (), 1, "cpu", merge=True, retries=1)
    assert [end(only_merges, OSError(28, "No space left on device")) for _ in range(2)] == [True, False]
    assert not SampleMergeJob(asked).lost(jobs[:3])
    assert SampleMergeJob(asked).lost(jobs) == jobs[3:]
    np.save(asked.shard_path(0), np.zeros(65536, np.float32))
    faults.forgive_set(asked.folder)  # a person draws what is missing
    assert SampleMergeJob(asked).lost(jobs) == jobs[1:]


@pytest.mark.processes
def test_compilers_that_a_signal_has_killed_are_no_failure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sampler = RunFolder(root / "runs" / "1d" / "a"), SamplerSettings(sampler="ddim", steps=2)
    asked = sample_set.choose(
        run, seed=0, sampler=sampler, weights="ema", checkpoint=None, compile=True, say=lambda text: None
    )
    target = sample_set.plan(run, asked, 10, "x")
    signals, watchdog = SignalWatch(), SimpleNamespace(phase=lambda *phase: None)

    def killed(network: torch.nn.Module, call: Callable[[], object]) -> float:
        signals.requested = Stop.TERMINATE
        raise JobError("g++ was killed")

    monkeypatch.setattr(compiling, "compile_by", killed)
    with pytest.raises(Stopped):
        draw.sample(target, [0], "cpu", signals, watchdog)  # type: ignore[arg-type]

    def fail(network: torch.nn.Module, call: Callable[[], object]) -> float:
        raise JobError("there is no g++")

    monkeypatch.setattr(compiling, "compile_by", fail)
    with pytest.raises(JobError, match=r"^there is no g\+\+; another set \(--name\) can be drawn without --compile$"):
        draw.sample(target, [0], "cpu", SignalWatch(), watchdog)  # type: ignore[arg-type]


def test_a_sample_depends_on_its_index_and_not_on_how_many_are_drawn(root: Path) -> None:
    folder = root / "runs" / "mnist-small" / "a" / "samples"
    steps = ("--sampler", "ddim", "--steps", "2")
    done("sample", "mnist-small", *steps, "--num-samples", "10", cwd=root, **NO_FIGURES)
    (few,) = folder.iterdir()
    ten = np.load(few / "samples.npz")["arr_0"]
    done("sample", "mnist-small", *steps, "--num-samples", "300", cwd=root, **NO_FIGURES)
    assert [path.name for path in folder.iterdir()] == [few.name]
    many = np.load(few / "samples.npz")["arr_0"]
    assert many.shape[0] == 300
    assert np.array_equal(many[:10], ten)
    more = ("--num-samples", "10", "--seed", "1", "--name", "other")
    done("sample", "mnist-small", *steps, *more, cwd=root, **NO_FIGURES)
    assert not np.array_equal(np.load(folder / "other" / "samples.npz")["arr_0"], ten)


def test_what_would_change_existing_samples_is_refused(root: Path) -> None:
    command = ("sample", "1d", "--num-samples", "100", "--sampler", "ddim", "--steps", "3", "--name", "kept")
    done(*command, cwd=root)  # with its picture, or the same command would draw it
    folder = root / "runs" / "1d" / "a" / "samples" / "kept"
    before = contents(folder)
    for flag, value in (("--steps", "4"), ("--seed", "1"), ("--weights", "model"), ("--num-samples", "50")):
        changed = [value if command[i - 1] == flag else word for i, word in enumerate(command)]
        ended = launch(*(changed if flag in command else [*command, flag, value]), cwd=root)
        assert ended.code == 2, ended
        assert "choose another --name" in ended.err
    ended = launch(*command, "--eta", "0.5", "--steps", "4", cwd=root)
    words = "samples kept were drawn with steps=3 eta=0.0, not steps=4 eta=0.5; choose another --name"
    assert words in sentence(ended.err)
    again = done(*command, cwd=root)
    assert "already" in again.out
    assert contents(folder) == before


def test_a_named_set_goes_on_with_its_own_checkpoint(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--num-samples", 70_000, "--name")
    done(*command, "whole", cwd=root, **NO_FIGURES)
    process = start_held(AFTER_SHARD, 1, *command, "s", cwd=root)
    held(root)
    assert interrupt(process, signal.SIGINT).code == 130
    done("resume", "1d/a", "--train.steps", 60, cwd=root, **NO_FIGURES)
    done(*command, "s", cwd=root, **NO_FIGURES)
    folder = root / "runs" / "1d" / "a" / "samples"
    assert contents(folder / "s") == contents(folder / "whole")
    refused = launch(*command, "s", "--checkpoint", 60, cwd=root)
    assert refused.code == 2
    assert "samples s were drawn with step=50, not 60; choose another --name" in sentence(refused.err)
    (folder / "s" / "shard-00001.npy").unlink()
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints" / "step-00000050")
    refused = launch(*command, "s", cwd=root)
    assert refused.code == 2
    gone = "samples s were drawn with the checkpoint of step 50, which is gone; choose another --name"
    assert gone in sentence(refused.err)


def test_a_new_set_takes_a_newer_checkpoint_if_the_training_has_just_deleted_its_own(root: Path) -> None:
    """Between the choice and the manifest, which keeps it, lies the import of torch, and Slurm is asked."""
    checkpoint = root / "runs" / "1d" / "a" / "checkpoints" / "step-00000050"
    process = start_held("jobs.sample.sample_set.plan", 1, "sample", "1d/a", "--num-samples", 10, cwd=root)
    held(root)
    done("resume", "1d/a", "--train.steps", 70, cwd=root, **NO_FIGURES)
    shutil.rmtree(checkpoint)
    let_go(root)
    ended = finish(process)
    assert ended.code == 0, ended
    assert "10 samples are in runs/1d/a/samples/step-00000070-" in ended.out


def test_a_complete_set_stays_complete_if_its_checkpoint_goes_while_it_is_to_grow(root: Path) -> None:
    command = ("sample", "1d/a", "--name", "kept", "--num-samples")
    done(*command, 10, cwd=root, **NO_FIGURES)
    before = contents(root / "runs" / "1d" / "a" / "samples" / "kept")
    process = start_held("jobs.sample.sample_set.plan", 1, *command, 20, cwd=root)
    held(root)
    done("resume", "1d/a", "--train.steps", 70, cwd=root, **NO_FIGURES)
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints" / "step-00000050")
    let_go(root)
    ended = finish(process)
    assert ended.code == 2 and "step 50, which is gone" in sentence(ended.err)
    assert contents(root / "runs" / "1d" / "a" / "samples" / "kept") == before


def test_a_complete_set_needs_its_checkpoint_no_more(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "kept", "--num-samples")
    done(*command, 70_000, cwd=root)  # with its picture, or the same command would have that left to do
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints" / "step-00000050")
    folder = root / "runs" / "1d" / "a" / "samples" / "kept"
    before = contents(folder)
    said = done(*command, 70_000, "--export", "npy", cwd=root).out
    assert "70,000 samples are in runs/1d/a/samples/kept already." in said
    assert len(np.load(folder / "export-npy-70000.npy")) == 70_000
    (folder / "export-npy-70000.npy").unlink()
    assert launch(*command, 70_000, "--weights", "model", cwd=root).code == 2
    (folder / "samples.npz").unlink()
    done(*command, 70_000, cwd=root)
    assert contents(folder) == before
    gone = "samples kept were drawn with the checkpoint of step 50, which is gone; choose another --name"
    for number in (70_001, 200_000):
        refused = launch(*command, number, cwd=root)
        assert refused.code == 2 and gone in sentence(refused.err)
    content = before["shard-00000.npy"]
    (folder / "shard-00000.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = launch(*command, 70_000, cwd=root)
    assert refused.code == 2 and gone in sentence(refused.err)
    assert json.loads(before["manifest.json"]) == json.loads((folder / "manifest.json").read_text())


def test_an_eta_of_0_that_is_typed_is_not_the_eta_of_the_set(root: Path) -> None:
    command = ("sample", "1d/a", "--num-samples", 10, "--name", "noisy")
    done(*command, "--sampler", "ddim", "--steps", 3, "--eta", 0.5, cwd=root, **NO_FIGURES)
    refused = launch(*command, "--eta", 0, cwd=root)
    assert refused.code == 2
    assert "samples noisy were drawn with eta=0.5, not eta=0.0" in sentence(refused.err)
    for eta in ((), ("--eta", 0.5)):
        done(*command, *eta, cwd=root, **NO_FIGURES)
    assert "as random as ddpm. (default: 0)" in sentence(done("sample", "--help", cwd=root).out)


def test_a_lost_or_cut_shard_is_drawn_again(root: Path) -> None:
    command = ("sample", "1d", "--num-samples", "200000", "--sampler", "dpm++", "--steps", "3", "--name", "kept")
    done(*command, cwd=root)  # with its picture, or the same command would have that left to do
    folder = root / "runs" / "1d" / "a" / "samples" / "kept"
    before = contents(folder)
    (folder / "shard-00001.npy").unlink()
    content = (folder / "shard-00002.npy").read_bytes()
    (folder / "shard-00002.npy").write_bytes(content[:1000])
    # Its sampler, which is not the default, need not be named again.
    done("sample", "1d", "--num-samples", "200000", "--name", "kept", cwd=root)
    assert contents(folder) == before


@pytest.mark.parametrize("damaged", ["shard-00001.npy", "samples.npz"])
def test_what_has_changed_of_a_complete_set_is_made_again(damaged: str, root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--num-samples", 70_000, "--name", "s")
    done(*command, cwd=root)  # with its picture, or the same command would have that left to do
    folder = root / "runs" / "1d" / "a" / "samples" / "s"
    before = contents(folder)
    content = bytearray(before[damaged])
    content[-9] ^= 1
    (folder / damaged).write_bytes(content)
    exported = folder / "export-npy-70000.npy"
    exported.write_bytes(b"made of what is damaged")
    again = done(*command, "--export", "npy", cwd=root)
    assert f"s/{damaged} has changed since it was written" in again.out and "already" not in again.out
    assert np.array_equal(np.load(exported), np.load(folder / "samples.npz")["arr_0"])
    exported.unlink()
    assert contents(folder) == before


@pytest.mark.parametrize("when", ["before it grows", "while it grows"])
def test_a_set_that_grows_takes_no_damaged_shard_over(when: str, root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--num-samples")
    done(*command, 140_000, "--name", "good", cwd=root, **NO_FIGURES)
    done(*command, 70_000, "--name", "big", cwd=root, **NO_FIGURES)
    folder = root / "runs" / "1d" / "a" / "samples" / "big"
    if when == "while it grows":
        process = start_held(AFTER_MANIFEST, 1, *command, 140_000, "--name", "big", cwd=root)
        os.kill(held(root), signal.SIGKILL)
        finish(process)
    shard = folder / "shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[1000:1004] = b"\xff" * 4  # a NaN
    shard.write_bytes(content)
    grown = done(*command, 140_000, "--name", "big", cwd=root, **NO_FIGURES)
    assert "big/shard-00000.npy has changed since it was written; it is drawn again" in grown.out
    assert grown.out.count("has changed since") == 1
    assert contents(folder) == contents(folder.with_name("good"))


def test_the_picture_of_a_set_that_has_grown_is_of_all_of_it(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--num-samples")
    for number, name in ((500, "whole"), (100, "grown"), (500, "grown")):
        done(*command, number, "--name", name, cwd=root)
    folder = root / "runs" / "1d" / "a" / "samples"
    assert contents(folder / "grown") == contents(folder / "whole")


def test_what_a_killed_process_has_half_written_is_removed_once_it_is_old(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "s", "--num-samples")
    done(*command, 10, cwd=root, **NO_FIGURES)
    folder = root / "runs" / "1d" / "a" / "samples" / "s"
    old, young = folder / ".samples.npz.7.tmp", folder / ".shard-00000.npy.8.tmp"
    for left in (old, young):
        left.touch()
    os.utime(old, (0, 0))
    done(*command, 20, cwd=root, **NO_FIGURES)
    assert young.exists() and not old.exists()


def test_a_set_without_hashes_grows(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "old", "--num-samples")
    done(*command, 10, cwd=root, **NO_FIGURES)
    path = root / "runs" / "1d" / "a" / "samples" / "old" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert "has changed since" not in done(*command, 20, cwd=root, **NO_FIGURES).out
    assert json.loads(path.read_text())["sha256"].keys() == {"samples.npz", "shard-00000.npy"}


def test_a_plain_command_names_the_set_that_was_begun_when_another_sampler_was_the_default(root: Path) -> None:
    done("sample", "1d", "--num-samples", "70000", "--steps", "3", cwd=root, **NO_FIGURES)
    (folder,) = (root / "runs" / "1d" / "a" / "samples").iterdir()
    before = contents(folder)
    # As a kill leaves it behind.
    begun = sample_set.read(RunFolder(root / "runs" / "1d" / "a"), folder.name)
    begun.write_manifest()
    for name in ("samples.npz", "shard-00001.npy"):
        (folder / name).unlink()
    words = f"the same command with --name {folder.name} --num-samples 70000 draws the rest of that set"
    assert words not in done("sample", "1d", "--num-samples", 10, "--sampler", "ddim", cwd=root, **NO_FIGURES).out
    assert words not in done("sample", "1d", "--num-samples", 10, "--seed", 1, cwd=root, **NO_FIGURES).out
    begun.add_job("17")
    squeue = root / "squeue"
    squeue.write_text("#!/bin/sh\necho '17|PENDING'\n")
    squeue.chmod(0o755)
    found = f"{root}:{os.environ['PATH']}"
    assert words not in done("sample", "1d", "--num-samples", 10, cwd=root, PATH=found, **NO_FIGURES).out
    shutil.rmtree(folder.with_name("step-00000050-dpm++-30-seed0"))
    squeue.write_text("#!/bin/sh\nexit 1\n")  # nobody knows
    assert words in done("sample", "1d", "--num-samples", 10, cwd=root, PATH=found, **NO_FIGURES).out
    assert words not in done("sample", "1d", "--num-samples", 20, cwd=root, **NO_FIGURES).out
    squeue.write_text("#!/bin/sh\n")  # the job has ended
    done("sample", "1d", "--name", folder.name, "--num-samples", 70000, cwd=root, PATH=found, **NO_FIGURES)
    (folder / ".jobs.json").unlink()
    assert contents(folder) == before


@pytest.mark.processes  # a training before it
@pytest.mark.parametrize(("before", "now", "named"), [("bf16", "fp32", 0), ("bf16", "bf16", 1), ("auto", "fp32", 1)])
def test_only_a_set_that_the_run_would_go_on_with_is_named(before: str, now: str, named: int, root: Path) -> None:
    run = RunFolder(root / "runs" / "1d" / "a")
    usual = SamplerSettings(sampler="dpm++", steps=30)
    chosen = sample_set.choose(run, seed=0, sampler=usual, weights="ema", checkpoint=None, say=print)
    old = replace(chosen, sampler=SamplerSettings(sampler="ddim", steps=50), precision=before)
    sample_set.plan(run, old, 64, None).write_manifest()
    assert len(sample_set.begun_with_other_samplers(run, replace(chosen, precision=now))) == named
    again = replace(old, precision=now)  # as the same command with --name asks for
    with pytest.raises(UserError, match="drawn with precision") if not named else nullcontext():
        sample_set.plan(run, again, 64, None)


AFTER_MANIFEST = "jobs.sample.sample_set.SampleSet.write_manifest"


def test_a_set_is_drawn_by_one_command_at_a_time(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "race")
    process = start_held(AFTER_MANIFEST, 1, *command, "--num-samples", 1000, cwd=root)
    held(root)
    for number in (1000, 2000):
        refused = launch(*command, "--num-samples", number, cwd=root, **NO_FIGURES)
        assert refused.code == 2
        assert "samples race are being drawn already, by another command" in sentence(refused.err)
    let_go(root)
    assert finish(process).code == 0
    folder = root / "runs" / "1d" / "a" / "samples" / "race"
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 1000
    done(*command, "--num-samples", 2000, cwd=root, **NO_FIGURES)
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 2000


def test_processes_that_outlive_their_command_keep_others_from_drawing(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "race", "--num-samples", 200_000, "--device", "cpu")
    process = start_held(AFTER_SHARD, 1, *command, "--gpus", 2, cwd=root)
    held(root)
    children = [pid for pid in workers(process) if pid != process.pid]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    refused = launch(*command, cwd=root, **NO_FIGURES)
    for pid in children:
        os.kill(pid, signal.SIGCONT)  # they have been told to stop meanwhile
    assert refused.code == 2
    assert "samples race are being drawn already, by another command" in sentence(refused.err)
    wait_until(lambda: not relatives(process))
    finish(process)
    done(*command, cwd=root, **NO_FIGURES)


@pytest.mark.parametrize("place", [AFTER_MANIFEST, AFTER_SHARD])
def test_where_a_lock_does_not_reach_a_set_never_shrinks(place: str, root: Path) -> None:
    """The smaller command has planned before the larger one began, and goes on after its end."""
    command = ("sample", "1d/a", "--steps", 3, "--name", "race")
    process = start_held(place, 1, *command, "--num-samples", 65536, cwd=root)
    held(root)
    folder = root / "runs" / "1d" / "a" / "samples" / "race"
    (folder.parent.parent / f".drawing-{folder.name}").unlink()  # as if on another machine
    done(*command, "--num-samples", 70000, cwd=root, **NO_FIGURES)
    before = contents(folder)
    let_go(root)
    ended = finish(process)
    assert ended.code == 1
    assert "samples race are to hold 70000 by now, not 65536" in sentence(ended.err)
    assert "samples are in" not in ended.out
    assert {name: content for name, content in contents(folder).items() if "failure" not in name} == before


def test_a_set_that_has_lost_a_shard_meanwhile_is_not_called_complete(root: Path) -> None:
    process = start_held(AFTER_SHARD, 1, "sample", "1d/a", "--num-samples", 70000, "--name", "s", cwd=root)
    held(root)
    (root / "runs" / "1d" / "a" / "samples" / "s" / "shard-00000.npy").unlink()
    let_go(root)
    ended = finish(process)
    assert ended.code == 1
    assert "runs/1d/a/samples/s does not hold these 70,000 samples" in ended.err
    assert "samples are in" not in ended.out


def test_a_set_that_never_came_to_its_end_may_become_smaller_and_keeps_what_is_drawn(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--num-samples")
    for number in (70_000, 200_000):
        done(*command, number, "--name", f"of-{number}", cwd=root, **NO_FIGURES)
    process = start_held(AFTER_SHARD, 3, *command, 200_000, "--name", "s", cwd=root)
    os.kill(held(root), signal.SIGKILL)
    finish(process)
    folder = root / "runs" / "1d" / "a" / "samples" / "s"

    def shards() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in folder.glob("shard-0000[0-2].npy")}

    before = shards()
    done(*command, 70_000, "--name", "s", "--export", "npy", cwd=root, **NO_FIGURES)
    smaller = np.load(folder.with_name("of-70000") / "samples.npz")["arr_0"]
    assert (folder / "samples.npz").read_bytes() == (folder.with_name("of-70000") / "samples.npz").read_bytes()
    assert np.array_equal(np.load(folder / "export-npy-70000.npy"), smaller)
    (folder / "export-npy-70000.npy").unlink()
    done(*command, 200_000, "--name", "s", cwd=root, **NO_FIGURES)
    assert contents(folder) == contents(folder.with_name("of-200000"))
    assert len(before) == 3 and shards() == before


def test_a_complete_set_outlives_a_growth_that_is_stopped(root: Path) -> None:
    command = ("sample", "1d/a", "--steps", 3, "--name", "gr", "--num-samples")
    done(*command, 100, cwd=root, **NO_FIGURES)
    folder = root / "runs" / "1d" / "a" / "samples" / "gr"
    before = contents(folder)
    for _ in range(2):
        process = start_held(AFTER_SHARD, 1, *command, 200_000, cwd=root)
        held(root)
        assert interrupt(process, signal.SIGINT).code == 130
    refused = launch(*command, 99, cwd=root)
    assert refused.code == 2
    assert "samples gr already hold 100, more than --num-samples 99; choose another --name" in sentence(refused.err)
    done(*command, 100, cwd=root, **NO_FIGURES)
    assert contents(folder)["samples.npz"] == before["samples.npz"]
    assert len(np.load(folder / "shard-00000.npy")) == 65536  # drawn for the growth, which may go on


def test_a_set_is_drawn_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    asked = sample_set.SampleSet(tmp_path, "s", SETTINGS, 10, 4)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with asked.alone():
        asked.begin({})
    with pytest.raises(UserError, match="samples s have just been changed by another command"):
        asked.begin({})


@pytest.mark.parametrize(
    ("arguments", "sampler", "steps"),
    [
        (["1d/a"], "dpm++", 30),
        (["1d/a", "--sampler", "dpm++"], "dpm++", 30),
        (["1d/a", "--sampler", "ddpm"], "ddpm", 50),  # all timesteps
        (["1d/a", "--sampler", "ddim"], "ddim", 50),
        (["1d/a", "--sampler", "ddim", "--steps", "7"], "ddim", 7),
        (["mnist-small/a"], "sde-dpm++", 20),
        (["mnist-small/a", "--steps", "30"], "sde-dpm++", 30),
        (["mnist-small/a", "--sampler", "ddpm"], "ddpm", 1000),
    ],
)
def test_a_sampler_takes_its_own_number_of_steps(arguments: list[str], sampler: str, steps: int, root: Path) -> None:
    shown = done("sample", *arguments, "--dry-run", cwd=root).out
    assert json.loads(shown[: shown.index("\n}") + 2])["sampler"] == {"sampler": sampler, "steps": steps, "eta": 0.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (
            ["--num-samples", "1000000000000000", "--export", "npy"],
            "1,000,000,000,000,000 samples need 8000000.00 GB of disk",
        ),
        (["--steps", "0"], "steps must lie between 1 and diffusion.timesteps=50"),
        (["--steps", "51"], "steps must lie between 1 and diffusion.timesteps=50"),
        (["--eta", "2"], "eta must lie between 0 and 1"),
        (["--sampler", "dpm++", "--eta", "0.5"], "only ddim takes eta"),
        (["--seed", "-1"], "--seed must lie between"),
        (["--checkpoint", "7"], "--checkpoint must be a step"),
        (["--name", "../x"], "a name is made of"),
        (["--name", ""], "a name is made of"),
        (["--sampler", "euler"], "euler"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(arguments: list[str], words: str, root: Path) -> None:
    ended = launch("sample", "1d/a", *arguments, cwd=root)
    assert ended.code == 2
    assert words in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert list((root / "runs" / "1d" / "a" / "samples").iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(root: Path) -> None:
    shutil.rmtree(root / "runs" / "1d" / "a" / "checkpoints")
    ended = launch("sample", "1d/a", cwd=root)
    assert ended.code == 2
    assert "no checkpoint" in ended.err


def test_the_manifest_says_what_was_used(root: Path) -> None:
    how = ("--num-samples", "100", "--sampler", "ddim", "--steps", "3", "--checkpoint", "best")
    done("sample", "1d", *how, "--name", "kept", cwd=root, **NO_FIGURES)
    manifest = json.loads((root / "runs" / "1d" / "a" / "samples" / "kept" / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["num_samples"] == 100
    assert manifest["sampler"] == {"sampler": "ddim", "steps": 3, "eta": 0.0}
    checkpoint = json.loads((root / "runs/1d/a/checkpoints/step-00000050/manifest.json").read_text())
    assert manifest["weights_sha256"] == checkpoint["files"]["ema.safetensors"]["sha256"]
