"""Devices and precision: a job computes where and how it was asked to, or says in one sentence that it cannot."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion.errors import OutsideError
from diffusion.process.cuda_graphs import Captured
from jobs.runtime import numerics
from jobs.runtime.job import JobError, MachineError
from jobs.runtime.world import World
from jobs.runtime.world import start as start_world
from tests.jobs.other_cpu import OTHER
from tests.launching import NO_FIGURES, ROOT, TINY, Finished, done, finish, launch, start, status

A_RUN = ("train", "1d", *TINY, "--train.steps", "20", "--name", "a")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of a precision, each with a set of samples."""

    @cache
    def runs(precision: str) -> Path:
        root = tmp_path_factory.mktemp("trained")
        done(*A_RUN, "--device", "cpu", "--train.precision", precision, cwd=root, **NO_FIGURES)
        done("sample", "1d/a", "--num-samples", "100", "--device", "cpu", cwd=root, **NO_FIGURES)
        return root / "runs"

    return runs


@pytest.mark.processes
@pytest.mark.parametrize(
    ("job", "precision"),
    [("train", "fp32"), ("train", "auto"), ("train", "bf16"), ("sample", "bf16"), ("evaluate", "fp32")],
)
def test_a_job_for_a_gpu_that_finds_none_says_so_and_does_nothing(
    job: str, precision: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a Slurm task on a node whose GPU is gone: the launcher has looked at another machine."""
    shutil.copytree(trained(precision), tmp_path / "runs")
    run = tmp_path / "runs" / "1d" / "a"
    if precision == "auto":
        (run / "timing.jsonl").unlink()  # so that it has to be resolved
    if job == "train":
        shutil.rmtree(run / "checkpoints")  # or the run would be finished, and nothing could fail it
    logged = (run / "metrics.jsonl").read_bytes()
    task = {"RANK": "0", "LOCAL_RANK": "0", "SLURMD_NODENAME": "n7"}
    ended = finish(start(job, run, cwd=ROOT, module="tests.jobs.for_gpu", **task))
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    for word in ("process 0", "n7", "CUDA_VISIBLE_DEVICES=", "finds no GPU"):
        assert word in ended.err, ended
    assert (run / "metrics.jsonl").read_bytes() == logged
    if job == "train":
        assert status(run)["state"] == "failed"


def test_auto_is_no_cpu_on_a_machine_with_gpus_that_torch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "DEV", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert numerics.resolve_device("auto", None) == "cpu"
    (tmp_path / "nvidiactl").touch()
    assert numerics.resolve_device("auto", None) == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(OutsideError, match=r"GPUs, but torch .* CUDA_VISIBLE_DEVICES=unset.*--device cpu"):
        numerics.resolve_device("auto", None)
    assert numerics.resolve_device("cpu", None) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # they are hidden on purpose
    assert numerics.resolve_device("auto", None) == "cpu"


@pytest.mark.parametrize(
    ("seen", "rank", "index"), [(4, 0, 0), (4, 3, 3), (1, 0, 0), (1, 3, 0), (8, 3, 3), (2, 2, None), (0, 0, None)]
)
def test_each_process_finds_its_own_gpu(
    seen: int, rank: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Slurm shows each task its own GPU alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch, "zeros", lambda n, device: None)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if index is None:
        with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES"):  # one may have fallen off its bus
            numerics.own_device("cuda")
    else:
        assert numerics.own_device("cuda") == torch.device("cuda", index)
        assert current == [torch.device("cuda", index)]  # else CUDA graphs would be captured on GPU 0


def test_no_graph_is_captured_on_another_gpu_than_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be empty, and its results those of the last call before it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match=r"^the tensors are on another GPU than CUDA's current one$"):
        Captured(lambda x: (x,), there)  # type: ignore[arg-type]


def test_a_gpu_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(n: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", broken)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(JobError, match=r"cannot use its GPU 1: CUDA error: uncorrectable ECC error encountered$"):
        numerics.own_device("cuda")


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_every_job_computes_in_what_the_precision_says(precision: Any) -> None:
    numerics.set_numerics(precision)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_auto_is_resolved_once_with_the_run_and_with_the_set(tmp_path: Path) -> None:
    """As if another kind of machine had begun: what it has chosen is what everything after it computes in."""
    own = numerics.resolve_precision("auto", "cpu")
    other = "fp32" if own == "bf16" else "bf16"
    command = ("train", "1d", *TINY, "--train.precision", "auto", "--name", "a", "--device", "cpu")
    run = tmp_path / "runs" / "1d" / "a"
    done(*command, "--train.steps", "20", cwd=tmp_path, **NO_FIGURES)
    [start] = [line for line in lines(run / "timing.jsonl") if line["event"] == "start"]
    assert start["precision"] == own
    timing = (run / "timing.jsonl").read_text()
    (run / "timing.jsonl").write_text(timing.replace(f'"precision": "{own}"', f'"precision": "{other}"'))
    done("resume", "1d/a", "--train.steps", "30", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    assert [line["precision"] for line in lines(run / "timing.jsonl") if line["event"] == "start"] == [other, other]
    done("sample", "1d/a", "--num-samples", "10", "--device", "cpu", cwd=tmp_path)
    [manifest] = run.glob("samples/*/manifest.json")
    assert json.loads(manifest.read_text())["precision"] == other
    # A set from before, which says auto, is as it was.
    manifest.write_text(manifest.read_text().replace(f'"precision": "{other}"', '"precision": "auto"'))
    assert "already" in done("sample", "1d/a", "--num-samples", "10", "--device", "cpu", cwd=tmp_path).out


def test_a_start_says_what_has_changed_in_what_bytes_depend_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    done(*A_RUN, "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    [start] = [line for line in lines(run / "timing.jsonl") if line["event"] == "start"]
    assert {"device", "cpu", "threads", "torch", "precision", "processes"} <= start.keys()
    same = done("resume", "1d/a", "--train.steps", "30", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    assert "bytes" not in same.out
    more = ("--train.steps", "40", "--train.precision", "bf16", "--device", "cpu")
    other = done("resume", "1d/a", *more, cwd=tmp_path, OMP_NUM_THREADS="2", **NO_FIGURES)
    [sentence] = [line for line in other.out.splitlines() if "bytes" in line]
    assert "precision fp32 before, bf16 now" in sentence
    assert "threads 1 before, 2 now" in sentence
    assert sentence in (run / "log.txt").read_text()


def test_a_start_speaks_for_all_its_processes_if_one_has_another_cpu(tmp_path: Path) -> None:
    def on_other_cpu(*arguments: str) -> Finished:
        return finish(start(*arguments, *two, cwd=tmp_path, module="tests.jobs.other_cpu", **NO_FIGURES))

    run, two = tmp_path / "runs" / "1d" / "a", ("--gpus", "2", "--device", "cpu")
    own = torch.backends.cpu.get_cpu_capability()
    both = ", ".join(sorted([own, OTHER]))
    alike = done(*A_RUN, *two, cwd=tmp_path, **NO_FIGURES)
    assert "bytes" not in alike.out
    changed = on_other_cpu("resume", "1d/a", "--train.steps", "30")
    assert changed.code == 0, changed
    drift = f"This run may have other bytes if it is interrupted: the processes differ in cpu ({both})."
    assert drift in changed.out
    assert f"bytes may differ from those of an uninterrupted run: cpu {own} before, {both} now." in changed.out
    assert [line["cpu"] for line in lines(run / "timing.jsonl") if line["event"] == "start"] == [own, both]
    # The same two again: nothing has changed, and still the weights drift apart.
    again = on_other_cpu("resume", "1d/a", "--train.steps", "40")
    assert drift in again.out
    assert "before" not in again.out
    reason = f"bytes may differ: the processes differ in cpu ({both})"
    assert f"from step 30 on {reason}" in on_other_cpu("audit", "1d/a", "--from", "30").out
    alike = launch("audit", "1d/a", "--from", "30", *two, cwd=tmp_path)
    assert f"from step 30 on bytes may differ: cpu {both} before, {own} now" in alike.out


def test_what_processes_have_in_common_is_said_once_and_what_not_is_listed() -> None:
    a100 = {"device": "cuda:0", "gpu": "NVIDIA A100", "threads": 8, "driver": None}
    h100 = {"device": "cuda:1", "gpu": "NVIDIA H100", "threads": 4, "driver": "580"}
    assert numerics.shared([a100, {**a100, "device": "cuda:1"}]) == a100
    assert numerics.mixed([a100, {**a100, "device": "cuda:1"}]) == []
    gpus = "NVIDIA A100, NVIDIA H100"
    assert numerics.shared([h100, a100, a100]) == {
        "device": "cuda:1",
        "gpu": gpus,
        "threads": "4, 8",
        "driver": "580, None",
    }
    assert numerics.mixed([h100, a100, a100]) == [f"the processes differ in gpu ({gpus})"]  # not by their hosts


def test_another_gpu_model_is_a_change_and_another_gpu_of_the_model_is_none() -> None:
    a100 = {"device": "cuda:0", "gpu": "NVIDIA A100", "precision": "bf16"}
    assert numerics.differing(a100, {**a100, "device": "cuda:3"}) == []
    assert "gpu NVIDIA A100 before, NVIDIA H100 now" in str(numerics.differing(a100, {**a100, "gpu": "NVIDIA H100"}))
    assert numerics.differing({"precision": "bf16"}, a100) == []  # an older version recorded less
    # A GPU's bytes do not depend on its host.
    assert numerics.differing({**a100, "threads": 8}, {**a100, "threads": 16}) == []
    assert "threads 8 before" in str(numerics.differing({"threads": 8}, {"device": "cpu", "threads": 16}))
    assert "device cuda:0 before, cpu now" in str(numerics.differing(a100, {"device": "cpu", "precision": "bf16"}))


def test_a_gpu_without_bf16_does_not_mix_it_with_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla V100")
    assert numerics.resolve_precision("auto", "cuda") == "fp32"
    assert "Tesla V100 does not compute in bf16" in str(numerics.lacking("bf16", "cuda"))
    assert "tf32" in str(numerics.lacking("tf32", "cuda"))
    assert numerics.lacking("fp32", "cuda") is None


def test_a_precision_that_a_cpu_does_not_have_is_refused(tmp_path: Path) -> None:
    ended = launch("train", "1d", "--train.precision", "tf32", "--device", "cpu", cwd=tmp_path)
    assert ended.code == 2
    assert "tf32" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("second", "words"), [("GPU-1", ""), ("GPU-0", "one and the same GPU"), ("MIG", "MIG slice")])
def test_processes_with_one_gpu_between_them_are_told(second: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is torch's own; the GPUs are pretended."""
    from torch.distributed import HashStore

    from jobs.runtime import world

    name = "NVIDIA A100 MIG 1g.5gb" if second == "MIG" else "NVIDIA A100"
    store = HashStore()
    store.set("gpu-of-0", "NVIDIA A100, GPU-0")
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, uuid=second))
    accelerator: Any = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cuda", 0))
    if words:
        with pytest.raises(JobError, match=words):
            world._check_own_gpus(accelerator)
    else:
        world._check_own_gpus(accelerator)


def test_a_process_that_is_alone_sums_and_keeps_what_it_has() -> None:
    alone: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(World(alone, "fp32").sum(values), values.double())
    assert World(alone, "fp32").of_first("token") == "token"


def test_a_process_may_go_on_with_another_precision() -> None:
    """An audit does, if the starts of a run have computed in different ones."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with start_world(1, "cpu", precision).accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
