"""--train.compile: the same training, what it costs is said, and one sentence where there is no compiler."""

import json
import os
import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import torch

from diffusion.settings import MlpSettings, UnetSettings
from jobs.audit import plan
from jobs.experiments.settings import Choice, TrainSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.runtime.compiling import compiled_at_first
from jobs.runtime.job import process_rank
from jobs.runtime.signals import SignalWatch, Stop
from jobs.runtime.world import World
from jobs.runtime.world import start as start_world
from jobs.sample import draw
from jobs.storage.records import starts
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.train.loop import COMPILING_PAYS, compile_network, compiles
from jobs.train.state import Training
from tests.held import AFTER_STEP, held, start_held
from tests.jobs.parallel import run
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
    # With several compilers, as a user has them.
    several = {**NO_FIGURES, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    compiled = done(*COMMAND, "--train.compile", "--name", "compiled", cwd=tmp_path, **several)
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


def test_compiled_samples_are_the_samples_however_they_are_drawn(tmp_path: Path) -> None:
    done("train", "1d", *SMALL, "--train.steps", STEPS, "--name", "a", cwd=tmp_path, **NO_FIGURES)
    sets = tmp_path / "runs" / "1d" / "a" / "samples"

    def drawn(name: str, n: int, *more: object) -> str:
        return done("sample", "1d/a", "--num-samples", n, "--name", name, "--device", "cpu", *more, cwd=tmp_path).out

    n = 65_536 + 5000  # two shards, the second with a part of a sub-batch
    drawn("plain", n)
    first = drawn("two", n, "--compile", "--gpus", 2)
    assert len(re.findall(r"Compiled the network in \d+ (?:s|min) \(--compile\)", first)) == 1
    drawn("one", 1000, "--compile")
    assert "Compiled" in drawn("one", n)  # a set that is there goes on as it was begun
    plain, two, one = (np.load(sets / name / "samples.npz")["arr_0"] for name in ("plain", "two", "one"))
    assert one.tobytes() == two.tobytes()
    np.testing.assert_allclose(two, plain, rtol=1e-3, atol=1e-3)  # the same arithmetic in another order of summation

    ended = launch(
        "sample", "1d/a", "--num-samples", n, "--name", "plain", "--compile", "--device", "cpu", cwd=tmp_path
    )
    assert ended.code == 2
    assert "samples plain were drawn with compile=False, not True; choose another --name" in ended.err
    nothing = {"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = launch("sample", "1d/a", "--compile", "--device", "cpu", cwd=tmp_path, **nothing)
    assert ended.code == 1
    assert "the network cannot be compiled on this machine:" in ended.err
    assert "Traceback" not in ended.err


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
    small_training(start_world(1, "cpu", "fp32")).compile()
    assert len(chosen) >= 2 and all(chosen)


def test_without_a_compiler_one_sentence_says_so(tmp_path: Path) -> None:
    """A folder of its own for what is compiled, else it finds what another test has compiled."""
    nothing = {"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = launch("train", "1d", *SMALL, "--train.compile", "--device", "cpu", "--name", "a", cwd=tmp_path, **nothing)
    assert ended.code == 1
    assert "the network cannot be compiled on this machine:" in ended.err
    assert "Traceback" not in ended.err


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What would be compiled from now on, which runs as it is; `meta["runs"]` says how often."""
    found: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: object) -> Any:
        def run(*arguments: Any) -> Any:
            graph.meta["runs"] = graph.meta.get("runs", 0) + 1
            return graph.forward(*arguments)

        found.append(graph)
        return run

    by_inductor = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, options: by_inductor(network, backend=kept))
    return found


def test_both_networks_are_compiled_where_one_guides_the_other(graphs: list[torch.fx.GraphModule]) -> None:
    preset = EXPERIMENTS["1d"].preset
    built = replace(preset, model=replace(preset.model, dim=8, layers=1)).build()  # type: ignore[call-arg]
    strong, weak = (built.build_model().eval() for _ in range(2))
    said: list[str] = []
    evaluate = draw.evaluation(strong, (weak, 2.5), True, "cpu", said.append)
    inputs = torch.tensor([[0.5], [-1.0]]), torch.tensor([3, 4])
    with torch.inference_mode():
        expected = 2.5 * strong.predict(*inputs) - 1.5 * weak.predict(*inputs)
        found = [evaluate(*inputs) for _ in range(3)]
    (graph,) = graphs  # they share it
    assert graph.meta["runs"] == 2 * (len(found) + 1)  # compiling makes a call of its own
    assert len(said) == 1
    torch.testing.assert_close(found, [expected] * 3)


@pytest.mark.parametrize("experiment", ["1d-classes", "mnist-classes-small"])
def test_a_network_is_compiled_once(
    experiment: str, graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where einops has seen no tensor yet: compiled code asks what it finds out at the first one."""
    monkeypatch.setattr(einops._backends, "_type2backend", {})
    monkeypatch.setattr(einops._backends, "_loaded_backends", {})
    preset = EXPERIMENTS[experiment].preset
    small = {"dim": 8, "dim_mults": (1,)} if isinstance(preset.model, UnetSettings) else {"dim": 8, "layers": 1}
    built = replace(preset, model=replace(preset.model, **small)).build()  # type: ignore[arg-type]
    model, seconds = built.build_model().eval(), list[float]()
    predict = compiled_at_first([model.network], model.predict, seconds.append)
    told = [torch.tensor([1, 0])] if model.num_classes else []
    with torch.inference_mode():
        found = [predict(torch.ones(2, *built.sample_shape), torch.tensor([3, 4]), *told) for _ in range(3)]
    assert (len(graphs), len(seconds)) == (1, 1)
    assert torch.equal(found[0], found[2])


def asked(experiment: str, steps: int, compile: Choice | None = None) -> TrainSettings:
    preset = EXPERIMENTS[experiment].preset.train
    return replace(preset, steps=steps, compile=compile or preset.compile)


def start_line(compile: str, device: str = "cuda:0", step: int = 0) -> dict[str, Any]:
    return {"event": "start", "time": TIME, "step": step, "device": device, "compile": compile}


TIME = "2026-11-27T12:00:00.000+00:00"
BEGIN = {"event": "begin", "time": TIME, "step": 0}


def test_a_gpu_compiles_long_runs_by_itself_and_each_start_as_the_first() -> None:
    long, short = asked("mnist", COMPILING_PAYS), asked("mnist", COMPILING_PAYS - 1)
    assert compiles(long, "cuda", []) and compiles(EXPERIMENTS["mnist"].preset.train, "cuda", [])
    assert not compiles(short, "cuda", []) and not compiles(long, "cpu", [])
    assert not compiles(asked("1d", COMPILING_PAYS), "cuda", [])  # nothing is won there
    # With more steps than at first, or where the first start could not.
    assert compiles(short, "cuda", [start_line("always")])
    assert not compiles(long, "cuda", [start_line("never")])
    # A CPU has other bytes in any case, and decides nothing for the GPU after it.
    between = start_line("never", "cpu", 50)
    assert not compiles(long, "cpu", [start_line("always")])
    assert compiles(long, "cuda", [start_line("always"), between]) and compiles(long, "cuda", [between])
    # As it was told to.
    assert compiles(asked("1d", 5, "always"), "cpu", [start_line("never")])
    assert not compiles(asked("mnist", COMPILING_PAYS, "never"), "cuda", [start_line("always")])


def test_what_has_become_of_a_start_decides_over_the_next() -> None:
    def next_one(*lines: dict[str, Any]) -> bool:
        return compiles(asked("mnist", COMPILING_PAYS), "cuda", starts(lines))

    fell_back = [start_line("always"), {**BEGIN, "compile": "never", "compile_s": 0}]
    assert not next_one(*fell_back)
    assert next_one(start_line("always"), {**BEGIN, "compile": "always", "compile_s": 60})
    # Before versions that recorded it: they were compiled as the settings said.
    old = {name: value for name, value in start_line("").items() if name != "compile"}
    assert starts([old, {**BEGIN, "compile_s": 60.0}])[0]["compile"] == "always"
    assert starts([old, {**BEGIN, "compile_s": 0}])[0]["compile"] == "never"
    # Twice killed while it compiled: perhaps by that. But not if it was told to stop, or had come further meanwhile.
    killed, stopped = start_line("always"), {"event": "requeued", "step": 0}
    assert next_one(killed) and not next_one(killed, killed)
    assert next_one(killed, stopped, killed, stopped) and next_one(killed, stopped, killed)
    assert next_one(killed, start_line("always", step=100))


def test_an_audit_computes_each_part_as_it_was_compiled(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [
        *(start_line("always"), {**BEGIN, "compile": "always", "compile_s": 60}),
        *(start_line("always", step=10), {**BEGIN, "step": 10, "compile": "never", "compile_s": 0}),
    ]
    run.timing.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    parts = plan._parts(plan._lasting_starts(run), EXPERIMENTS["mnist"].preset, 0, 20)
    assert [(part.stop, part.config.train.compile) for part in parts] == [(10, "always"), (20, "never")]


@dataclass(frozen=True)
class AutoJob:
    """A training that nobody has asked to compile, in two processes of which one cannot."""

    folder: Path

    def __call__(self) -> int:
        from torch._inductor import config as inductor

        rank, sys.stdout = process_rank(), sys.stderr  # stdout is for how the job has ended
        inductor.compile_threads = 1  # else it starts processes that import torch, too
        if rank == 1:  # which must not find what others have compiled
            os.environ |= {"PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache")}
        world, signals = start_world(2, "cpu", "fp32"), SignalWatch()
        plain = some_losses(small_training(world))
        signals.requested = Stop.REQUEUE if rank == 1 else Stop.NO
        stopped = compile_network(small_training(world), signals, Console(self.folder / "stopped.txt"))
        signals.requested = Stop.NO
        training = small_training(world)
        alone = compile_network(training, signals, Console(self.folder / "log.txt"))
        auto = some_losses(training)
        # The next training of a process that went on uncompiled, as in a sweep.
        seconds = small_training(world).compile() if rank == 0 else 0
        (self.folder / f"{rank}.json").write_text(json.dumps([plain, stopped, alone, auto, seconds > 0.1]))
        world.close()
        return 0


def some_losses(training: Training) -> list[float]:
    return [training.sums(training.update())[0] for _ in range(3)]


def small_training(world: World) -> Training:
    preset = EXPERIMENTS["1d"].preset
    settings = replace(preset.train, batch_size=8, grad_shards=2)
    small = replace(preset, model=MlpSettings(dim=8, layers=1), train=settings)
    return Training(small.build(), small.train, world)


@pytest.mark.processes
def test_processes_of_which_one_cannot_compile_all_go_on_without(tmp_path: Path) -> None:
    outcome, said = run(AutoJob(tmp_path), 2)
    assert outcome.exit_code == 0, said
    for rank in range(2):
        plain, stopped, alone, auto, compiles_again = json.loads((tmp_path / f"{rank}.json").read_text())
        assert auto == plain
        assert (alone, compiles_again) == ([None, False], rank == 0)
        assert stopped == [None, True]  # a signal may have killed the compilers
    said = (tmp_path / "log.txt").read_text()
    assert said.count("The network cannot be compiled on this machine") == said.count("\n") == 1
    assert not (tmp_path / "stopped.txt").exists()


def test_the_words_of_the_command_line(tmp_path: Path) -> None:
    def read(*words: object) -> Any:
        ended = launch("train", "mnist-small", "--name", "a", "--dry-run", *words, cwd=tmp_path)
        return re.search(r'"compile": "(\w+)"', ended.out)[1] if ended.code == 0 else ended.err  # type: ignore[index]

    assert [read(), read("--train.compile"), read("--train.compile", "--train.steps", 9)] == [
        "auto",
        "always",
        "always",
    ]
    assert [read("--train.compile", word) for word in ("auto", "always", "never")] == ["auto", "always", "never"]
    assert "must be auto, always or never" in " ".join(read("--train.compile", "perhaps").split())
