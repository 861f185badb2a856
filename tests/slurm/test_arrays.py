"""Arrays on a real Slurm: samples and sweeps, with tasks, merge jobs and nodes that die in the middle."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from jobs.storage import provenance
from slurm.devcluster import DevCluster, wait_for
from tests.launching import NO_FIGURES, TINY, Finished, as_if_drawn, done, interrupt, launch, start, status, wait_until
from tests.slurm.site import DRAW, change, made_once

pytestmark = pytest.mark.slurm

# Three shards, an element for each, which costs 3 CPU seconds. Five where the rest of the array must not be over when
# something happens to it; with one GPU they have four elements, of which one draws two.
SAMPLE, SAMPLE_MORE = (
    ("sample", "1d/a", "--num-samples", num_samples, "--sampler", "ddim", "--steps", "10")
    for num_samples in ("170000", "300000")
)
SLURM = ("--cluster", "slurm", "--device", "cpu", "--slurm.cpus-per-gpu", "1", "--slurm.time-min", "10")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 1D run and its samples as one process here draws them."""

    def make(root: Path) -> None:
        done("train", "1d", *TINY, "--train.steps", "50", "--name", "a", "--cluster", "local", cwd=root, **NO_FIGURES)
        done(*SAMPLE, "--name", "here", "--cluster", "local", cwd=root)
        done(*SAMPLE_MORE, "--name", "here-more", "--cluster", "local", cwd=root, **NO_FIGURES)

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def on_slurm(
    root: Path,
    cluster: DevCluster,
    *more: object,
    gpus: int = 2,
    sample: tuple[str, ...] = SAMPLE,
    env: Mapping[str, str] = NO_FIGURES,
) -> Finished:
    ended = launch(*sample, *SLURM, "--gpus", gpus, "--name", "there", *more, cwd=root, **cluster.env, **env)
    assert ended.code in (0, 1), ended
    return ended


def assert_same_samples(root: Path, experiment: str = "1d", here: str = "here", pictures: bool = False) -> None:
    folder = root / "runs" / experiment / "a" / "samples"
    for path in sorted((folder / here).iterdir()):
        if pictures or path.suffix != ".png":
            assert path.read_bytes() == (folder / "there" / path.name).read_bytes(), path.name


def shards(root: Path) -> list[Path]:
    return sorted((root / "runs" / "1d" / "a" / "samples" / "there").glob("shard-*.npy"))


def job_ids(root: Path) -> list[str]:
    ids: list[str] = json.loads((root / "runs" / "1d" / "a" / "launch.json").read_text())["sample_job_ids"]
    return ids


def merge_log(root: Path, job_id: str) -> str:
    return (root / "runs" / "1d" / "a" / "slurm" / f"{job_id}_0_log.out").read_text()


def elements(root: Path) -> list[int]:
    """Processes of the array's running tasks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        mine = str(root).encode() in command and b"submitit.core._submit" in command and b"srun" not in command[:20]
        if mine and b"SLURM_ARRAY_TASK_ID=" in environment and b"SLURM_PROCID=" in environment:
            found.append(int(folder.name))
    return found


def killed(pids: Iterable[int]) -> bool:
    """Kills tasks; returns whether there was one that lived."""
    any_lived = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            any_lived = True
    return any_lived


def test_the_drill_on_slurm(tidy: DevCluster, tmp_path: Path) -> None:
    command = ("drill", *SLURM, "--gpus", 2, "--slurm.gpus-per-node", 2, "--steps", 400, "--kills", 2)
    ended = launch(*command, cwd=tmp_path, **tidy.env, **NO_FIGURES)
    assert ended.code == 0, ended
    assert "Equal byte for byte" in ended.out
    assert "scontrol requeue" in ended.out


def test_a_drill_that_is_ended_leaves_no_job(tidy: DevCluster, tmp_path: Path) -> None:
    drill = start("drill", *SLURM, "--steps", 1_000_000, cwd=tmp_path, **tidy.env, **NO_FIGURES)
    wait_until(lambda: list(tmp_path.glob("runs/drill/*/1d/whole/metrics.jsonl")) != [], timeout_s=120)
    assert interrupt(drill, signal.SIGTERM).code == 143
    wait_until(lambda: tidy.run("squeue", "--noheader") == "")


def test_an_array_draws_what_one_process_here_draws(tidy: DevCluster, root: Path) -> None:
    ended = on_slurm(root, tidy, "--wait", env={})
    assert ended.code == 0, ended
    assert "MB of disk" in ended.out
    assert "array of" in ended.out
    assert_same_samples(root, pictures=True)
    again = on_slurm(root, tidy)
    assert "already" in again.out
    assert len(job_ids(root)) == 2


def test_an_array_audits_the_stretches_between_kept_checkpoints(tidy: DevCluster, root: Path) -> None:
    run = root / "runs" / "1d" / "a"
    train = ("--train.steps", 70, "--train.checkpoint-every", 10, "--device", "cpu", "--cluster", "local")
    done("resume", "1d/a", *train, cwd=root, **NO_FIGURES)
    kept = [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]
    found = launch("audit", "1d/a", *SLURM, "--gpus", 2, "--wait", cwd=root, **tidy.env)
    assert found.code == 0, found
    assert "as an array of 2 jobs" in found.out
    assert f"steps {kept[0]} to 70: 1 checkpoint and {70 - kept[0]} lines of metrics.jsonl are equal" in found.out
    assert "Steps 0 to 70 are what this code makes of these settings." in found.out
    assert not (run / "slurm").exists()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    wrong = json.dumps({**json.loads(lines[2]), "loss": 0.125})
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], wrong, *lines[3:]]) + "\n")
    found = launch("audit", "1d/a", *SLURM, "--to", kept[0], "--wait", cwd=root, **tidy.env)
    assert found.code == 1
    assert f"steps 0 to {kept[0]}: DIFFERENT\n  from step 3 on: metrics.jsonl (loss)\nWhat" in found.out


def test_sets_of_classes_of_a_run_trained_on_slurm_are_those_drawn_here(tidy: DevCluster, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d-classes" / "a"
    six = ("--data.means", *range(6), "--data.stds", *[0.1] * 6, "--data.weights", 0.5, *[0.1] * 5)
    train = ("train", "1d-classes", *TINY, *six, "--train.steps", 50, "--name", "a", *SLURM, "--wait")
    trained = launch(*train, cwd=tmp_path, **tidy.env, **NO_FIGURES)
    assert trained.code == 0, trained
    command = ("sample", run, "--num-samples", 70_001, "--classes", "3,5,0", "--guidance", 2, "--steps", 5)
    done(*command, "--name", "here", "--cluster", "local", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    there = launch(*command, "--name", "there", *SLURM, "--gpus", 2, "--wait", cwd=tmp_path, **tidy.env, **NO_FIGURES)
    assert there.code == 0, there
    assert "array of 2 jobs" in there.out
    assert_same_samples(tmp_path, "1d-classes")
    with np.load(run / "samples" / "there" / "samples.npz") as found:  # a shard is no whole number of rounds
        assert np.array_equal(found["arr_1"], np.array([3, 5, 0])[np.arange(70_001) % 3])


def test_a_killed_task_and_a_lost_merge_job_are_made_up_for(tidy: DevCluster, root: Path) -> None:
    on_slurm(root, tidy, "--retries", 0, gpus=1, sample=SAMPLE_MORE)
    array, merge = job_ids(root)
    wait_until(lambda: len(shards(root)) >= 1, timeout_s=120)
    older = set(elements(root))
    wait_until(lambda: killed(set(elements(root)) - older), timeout_s=120)  # it imports torch and has drawn nothing yet
    tidy.run("scancel", merge)
    refused = launch(*SAMPLE_MORE, *SLURM, "--gpus", 1, "--name", "there", cwd=root, **tidy.env)
    assert refused.code == 2
    assert "being drawn already" in refused.err

    def over() -> bool:
        killed(set(elements(root)) - older)  # those that follow, too: a busy machine may have killed the first too late
        return array not in tidy.run("squeue", "--noheader", "--format=%F")

    wait_until(over, timeout_s=180)
    kept = {path: path.stat().st_mtime_ns for path in shards(root)}
    assert 1 <= len(kept) < 5
    ended = on_slurm(root, tidy, "--wait", sample=SAMPLE_MORE)
    assert ended.code == 0, ended
    assert_same_samples(root, here="here-more")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_killed_element_is_queued_again(tidy: DevCluster, root: Path) -> None:
    on_slurm(root, tidy)
    wait_until(lambda: killed(elements(root)[:1]), timeout_s=120)
    wait_until(lambda: tidy.run("squeue", "--noheader") == "", timeout_s=240)
    _, merge = job_ids(root)
    assert merge_log(root, merge).count("missing") == 0
    faults = (root / "runs" / "1d" / "a" / "samples" / "there" / "faults.jsonl").read_text().splitlines()
    (fault,) = map(json.loads, faults)
    assert fault["cause"] == "task 0 was ended: Killed"
    assert fault["again"] is True
    assert_same_samples(root)


def test_an_array_makes_up_for_an_element_whose_script_is_killed_too(tidy: DevCluster, root: Path) -> None:
    on_slurm(root, tidy)
    wait_until(lambda: bool(elements(root)), timeout_s=120)
    tidy.run("scancel", "--batch", "--signal=KILL", f"{job_ids(root)[0]}_0")
    wait_until(lambda: tidy.run("squeue", "--noheader") == "", timeout_s=240)
    _, merge, _, last = job_ids(root)
    assert "1 of 3 shards are missing." in merge_log(root, merge)
    assert tidy.wait_for_job(last, "COMPLETED")
    assert_same_samples(root)


@pytest.mark.parametrize("element", [0, 2])
def test_a_cancelled_element_stays_away(element: int, tidy: DevCluster, root: Path) -> None:
    on_slurm(root, tidy)  # two elements run at once, so the last one waits
    array, merge = job_ids(root)
    wait_until(lambda: bool(elements(root)), timeout_s=120)
    tidy.run("scancel", f"{array}_{element}")
    wait_until(lambda: tidy.run("squeue", "--noheader") == "", timeout_s=240)
    assert job_ids(root) == [array, merge]
    assert (
        "1 of 3 shards are missing.\nSomething is still missing: the command that submitted this does the rest."
        in merge_log(root, merge)
    )


WAIT = """\
            import os, pathlib, time
            start = "-".join(os.environ.get(f"SLURM_{{name}}", "0") for name in ("ARRAY_TASK_ID", "RESTART_COUNT"))
            pathlib.Path({marks!r}, start).touch()
            while signals.requested is Stop.NO and not os.path.exists({hurry!r}):
                time.sleep(0.05)
"""
"""There it leaves the mark ELEMENT-RESTARTS, and waits for a signal or for a file."""


def test_preempted_tasks_come_back_alone(tidy: DevCluster, root: Path) -> None:
    run, marks, hurry = root / "runs" / "1d" / "a", root / "marks", root / "hurry"
    marks.mkdir()
    with (run / "code" / "launch.py").open("a") as file:
        file.write("# other code: the array keeps today's in a folder of its own, which can be changed before")
    code = provenance.code_folder(run)
    provenance.save_code(code)
    change(code / "jobs" / "sample" / "draw.py", DRAW, WAIT.format(marks=str(marks), hurry=str(hurry)) + DRAW)

    def starts() -> set[str]:
        return {path.name for path in marks.iterdir()}

    on_slurm(root, tidy, sample=SAMPLE_MORE)
    wait_until(lambda: starts() == {"0-0", "1-0"}, timeout_s=120)  # two at once
    urgent = tidy.submit("sleep 1", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    tidy.wait_for_job(urgent, "COMPLETED", timeout_s=90)
    assert shards(root) == []
    hurry.touch()
    _, merge = job_ids(root)
    tidy.wait_for_job(merge, "COMPLETED", timeout_s=240)
    assert starts() == {"0-0", "1-0", "0-1", "1-1", "2-0", "3-0", "4-0"}
    assert_same_samples(root, here="here-more")


def test_a_dead_node_takes_only_its_own_tasks_along(tidy: DevCluster, root: Path) -> None:
    on_slurm(root, tidy, sample=SAMPLE_MORE)
    wait_until(lambda: len(shards(root)) >= 1 and bool(elements(root)), timeout_s=120)
    running = ("squeue", "--noheader", "--states=RUNNING", "--format=%N")
    busy = wait_for(lambda: tidy.run(*running).split(), "an element")  # none for a moment, between two of them
    tidy.kill_node(busy[0])
    try:
        tidy.wait_for_node(busy[0], "DOWN", timeout_s=90)
    finally:
        tidy.start_node(busy[0])
    wait_until(lambda: tidy.run("squeue", "--noheader") == "", timeout_s=240)
    assert_same_samples(root, here="here-more")


def test_arrays_are_cut_where_slurm_allows_no_longer_ones(root: Path) -> None:
    folder = tempfile.mkdtemp(prefix="devcluster-")
    with DevCluster.start(folder, accounting=False, max_array_size=2, node_prefix="a") as small:
        ended = on_slurm(root, small, "--wait")
        assert ended.code == 0, ended
        assert len(job_ids(root)) == 3  # 3 elements in arrays of 2 and 1, and the merge job
    assert_same_samples(root)


def test_a_sweep_is_an_array_of_runs(tidy: DevCluster, tmp_path: Path) -> None:
    command = (
        "sweep",
        "1d",
        *TINY,
        "--train.steps",
        "40",
        "--diffusion.timesteps",
        "21",
        "--name",
        "S",
        "--grid",
        "train.lr=1e-3,4e-3",
    )
    where = (*SLURM, "--gpus", 2, "--slurm.gpus-per-node", 2)
    ended = launch(*command, *where, "--wait", cwd=tmp_path, **tidy.env, **NO_FIGURES)
    assert ended.code == 0, ended
    runs = [tmp_path / "runs" / "1d" / f"S-00{i}" for i in range(2)]
    assert [status(run)["state"] for run in runs] == ["finished"] * 2
    ids = [json.loads((run / "launch.json").read_text())["job_ids"] for run in runs]
    array = ids[0][0].split("_")[0]
    assert ids == [[f"{array}_{i}"] for i in range(2)]
    log = launch("logs", "1d/S-001", cwd=tmp_path, **tidy.env)
    assert "Finished" in log.out
    wait_until(lambda: tidy.run("squeue", "--noheader") == "")
    for run in runs:
        as_if_drawn(run)
    again = launch(*command, *where, cwd=tmp_path, **tidy.env)
    assert "finished or on their way" in again.out
    shown = launch("status", "S", "--json", cwd=tmp_path, **tidy.env)
    assert len(json.loads(shown.out)) == 2
