"""--train.compile: the same training, what it costs is said, and one sentence where there is no compiler."""

import json
import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from diffusion.settings import MlpSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.runtime.job import process_rank
from jobs.runtime.world import start as start_world
from jobs.terminal.console import Console
from jobs.train.loop import COMPILING_PAYS, compile_network, compiles
from jobs.train.state import Training
from slurm import local
from tests.held import AFTER_STEP, held, start_held
from tests.launching import NO_FIGURES, TINY, done, interrupt, launch, steps_logged

STEPS = 30
SMALL = (*TINY, "--model.layers", 1)  # each layer takes a second to compile, in each of five processes
COMMAND = ("train", "1d", *SMALL, "--train.steps", STEPS, "--train.grad-shards", 2, "--device", "cpu")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_compiled_training_is_the_same_training_and_continues_as_such(tmp_path: Path) -> None:
    """On any number of processes, each of which compiles: two of them until it is stopped, one where it is not."""
    runs = tmp_path / "runs" / "1d"
    done(*COMMAND, "--name", "plain", cwd=tmp_path, **NO_FIGURES)
    compiled = done(*COMMAND, "--train.compile", "--name", "compiled", cwd=tmp_path, **NO_FIGURES)
    said = r"Compiled the network in \d+ (?:s|min) \(--train.compile\)"
    assert len(re.findall(said, compiled.out)) == 1
    # The same arithmetic in another order of summation.
    assert losses(runs / "compiled")[:20] == pytest.approx(losses(runs / "plain")[:20], rel=1e-4)

    process = start_held(AFTER_STEP, 5, *COMMAND, "--train.compile", "--gpus", 2, "--name", "stopped", cwd=tmp_path)
    held(tmp_path)
    stopped = interrupt(process, signal.SIGINT)
    assert stopped.code == 130
    assert len(re.findall(said, stopped.out)) == 1
    assert 5 <= steps_logged(runs / "stopped") < STEPS
    done("resume", "1d/stopped", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (runs / "stopped" / last).read_bytes() == (runs / "compiled" / last).read_bytes()


@pytest.mark.processes  # Inductor's
def test_nothing_is_timed_to_choose_kernels_neither_forward_nor_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a GPU's bytes would depend on which kernel was faster at this start."""
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    chosen = []
    lower = GraphLowering.run

    def run(graph: GraphLowering, *inputs: Any) -> Any:
        chosen.append(config.deterministic)
        return lower(graph, *inputs)

    monkeypatch.setattr(GraphLowering, "run", run)
    # Else an earlier run of this test has compiled it already.
    monkeypatch.setattr(config, "fx_graph_cache", False)
    monkeypatch.setattr(autograd_config, "enable_autograd_cache", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    preset = EXPERIMENTS["1d"].preset
    settings = replace(preset.train, batch_size=8, grad_shards=2)
    small = replace(preset, model=MlpSettings(dim=8, layers=1), train=settings)
    Training(small.build(), small.train, start_world(1, "cpu", "fp32")).compile()
    assert len(chosen) >= 2 and all(chosen)


def test_without_a_compiler_one_sentence_says_so(tmp_path: Path) -> None:
    """A folder of its own for what is compiled, else it finds what another test has compiled."""
    nothing = {"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = launch("train", "1d", *SMALL, "--train.compile", "--device", "cpu", "--name", "a", cwd=tmp_path, **nothing)
    assert ended.code == 1
    assert "the network cannot be compiled on this machine:" in ended.err
    assert "Traceback" not in ended.err


def test_a_gpu_compiles_long_runs_by_itself_and_each_start_as_the_first() -> None:
    preset = EXPERIMENTS["mnist"].preset.train
    long, short = replace(preset, steps=COMPILING_PAYS), replace(preset, steps=COMPILING_PAYS - 1)
    assert compiles(long, "cuda", {}) and compiles(preset, "cuda", {})
    assert not compiles(short, "cuda", {}) and not compiles(long, "cpu", {})
    # With more steps than at first, or where the first start could not; a CPU has other bytes in any case.
    assert compiles(short, "cuda", {"compile": True}) and not compiles(long, "cuda", {"compile": False})
    assert not compiles(long, "cpu", {"compile": True})
    assert compiles(replace(short, compile=True), "cpu", {"compile": False})
    assert not compiles(replace(long, compile=False), "cuda", {"compile": True})


@dataclass(frozen=True)
class AutoJob:
    """A few steps of a training that nobody has asked to compile, in processes of which some can."""

    folder: Path
    tries: bool

    def __call__(self) -> int:
        rank = process_rank()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / f"cache-{rank}")
        if rank == 1:
            os.environ["PATH"] = "/nowhere"
        world, preset = start_world(2, "cpu", "fp32"), EXPERIMENTS["1d"].preset
        settings = replace(preset.train, batch_size=8, grad_shards=2)
        small = replace(preset, model=MlpSettings(dim=8, layers=1), train=settings)
        training = Training(small.build(), small.train, world)
        compiled = compile_network(training, Console(self.folder / "log.txt")) if self.tries else None
        losses = [training.sums(training.update())[0] for _ in range(3)]
        (self.folder / f"{rank}.json").write_text(json.dumps([compiled, losses]))
        world.close()
        return 0


def test_processes_of_which_one_cannot_compile_all_go_on_without(tmp_path: Path) -> None:
    found = {}
    for tries in (False, True):
        folder = tmp_path / str(tries)
        folder.mkdir()
        assert local.run(AutoJob(folder, tries), 2).exit_code == 0
        found[tries] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[True] == found[False] and found[True][0][0] is None
    said = (tmp_path / "True" / "log.txt").read_text()
    assert said.count("The network cannot be compiled on this machine") == said.count("\n") == 1
