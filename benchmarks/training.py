"""Training speed on one U-Net (mults (1, 2, 4), 28x28) from the same weights: ours against what a user would run.

On a CPU its dim is 32 and the batch 128, ours in bf16 where the CPU computes in it and in fp32, the others in fp32, as
they are. On a GPU dim is 64, as in `mnist`, ours and the others in bf16, ours also compiled, as a GPU trains long runs.
All see shuffled digits; the loss that each reports is the mean over its last round, after the same number of images.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import Alternative, Measurements, Row, in_turn, limit, ratio
from benchmarks.peers import (
    LR,
    Case,
    diffusers_example,
    experiment,
    library_model,
    plain_loop,
    png_folder,
    rounds_of,
    trainer,
)

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind, Precision

BATCH_SIZE = 128
GPU_IMAGES = 20_000
"""Files for `Trainer` on a GPU, whose rounds do not come to the end of them."""


def ours(case: Case, steps: int, precision: "Precision", compile: bool = False) -> Measurements:
    """This project's update, with its data, noise, moving average, clipping and all."""
    from benchmarks.device import hide_gpus
    from jobs.experiments.settings import TrainSettings
    from jobs.runtime.malloc import keep_freed_memory
    from jobs.runtime.world import start
    from jobs.train.state import Training

    hide_gpus(case.device)
    keep_freed_memory()  # as each of our jobs does
    # No warm-up and, over so many steps, next to no decay, because `Trainer` and the Accelerate loop have none.
    settings = TrainSettings(steps=1_000_000, batch_size=case.batch_size, lr=LR, warmup_steps=1, beta2=0.99)
    training = Training(experiment(case.dim), settings, start(1, case.device, precision))
    training.raw.network.load_state_dict(library_model(case.dim).model.state_dict())
    compile_s = training.compile() if compile else 0.0
    if case.device == "cuda":
        training.capture()
    for measured in rounds_of(case, steps, lambda: training.update().loss):
        yield {**measured, "compile_s": compile_s}


PEERS = {"`Trainer`": trainer, "Accelerate loop": plain_loop, "diffusers' example": diffusers_example}
AT_LEAST = {"`Trainer`": 2.5, "Accelerate loop": 1.6, "diffusers' example": 1.6}
"""Targets for a CPU; for GPUs none has been set."""


def rows(rounds: int, steps: int | None, device: "Kind", small: bool) -> Iterator[Row]:
    """The comparisons; each round takes `steps` steps of each."""
    from jobs.runtime.numerics import resolve_precision

    mine = resolve_precision("auto", device)
    with png_folder(1000 if small else GPU_IMAGES if device == "cuda" else 60_000) as pngs:
        case = _case(device, small, pngs)
        # On a CPU the others run in fp32, as they are; on a GPU their users know bf16.
        pairs = [(mine, mine if device == "cuda" else "fp32")]
        if device == "cpu" and mine != "fp32":
            pairs.append(("fp32", "fp32"))
        yield from _compare(case, rounds, steps or _steps(case, small), pairs, targets=not small and device == "cpu")


def compiled(rounds: int, steps: int | None, device: "Kind", small: bool) -> Iterator[Row]:
    """What --train.compile gains, and what it costs at each start."""
    from jobs.runtime.numerics import resolve_precision

    case, precision = _case(device, small, Path()), resolve_precision("auto", device)
    asked = (case, steps or _steps(case, small), precision)
    found = in_turn({"compiled": Alternative(ours, *asked, True), "ours": Alternative(ours, *asked)}, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    losses = {name: f"loss {measured[-1]['loss']:.3f}" for name, measured in found.items()}
    what = f"training, `--train.compile`{case.label}, {losses['compiled']}"
    yield ratio(what, speeds["compiled"], speeds["ours"], f"without it ({losses['ours']})", None)
    yield limit("compiling, at each start", "s", [found["compiled"][0]["compile_s"]], None)


def _case(device: "Kind", small: bool, pngs: Path) -> Case:
    return Case(device, 8, 16, pngs) if small else Case(device, 32 if device == "cpu" else 64, BATCH_SIZE, pngs)


def _steps(case: Case, small: bool) -> int:
    """Those of a round, unless somebody asks for another number: enough for the clock, few enough for patience."""
    if case.device == "cpu":
        return 1 if small else 3
    return 32


def _compare(
    case: Case, rounds: int, steps: int, pairs: "list[tuple[Precision, Precision]]", targets: bool
) -> Iterator[Row]:
    """Ours beside each of the others, for each pair of a precision of ours and one of theirs."""
    peers = dict(PEERS)
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed; its example is left out", file=sys.stderr)
        del peers["diffusers' example"]
    alternatives = {f"ours {mine}": Alternative(ours, case, steps, mine) for mine, _ in pairs}
    mines = [(f"ours {mine}", theirs) for mine, theirs in pairs]
    if case.device == "cuda":
        mine, theirs = pairs[0]
        alternatives[f"ours {mine} compiled"] = Alternative(ours, case, steps, mine, True)
        mines.append((f"ours {mine} compiled", theirs))
    for precision in {theirs for _, theirs in pairs}:
        for peer, measure in peers.items():
            alternatives[f"{peer} {precision}"] = Alternative(measure, case, steps, precision)
    found = in_turn(alternatives, rounds)
    speeds = {name: [each["images_per_s"] for each in measured] for name, measured in found.items()}
    losses = {name: f"loss {measured[-1]['loss']:.3f}" for name, measured in found.items()}
    for i, (name, theirs) in enumerate(mines):
        for peer in peers:
            other = f"{peer} {theirs}"
            target = AT_LEAST[peer] if targets and i == 0 else None
            what = f"training{case.label}, {name.removeprefix('ours ')}, {losses[name]}"
            yield ratio(what, speeds[name], speeds[other], f"{other} ({losses[other]})", target)
    for name, measured in found.items():
        if case.device == "cuda":
            memory = [each["memory_mb"] for each in measured]
            yield limit(f"memory of training{case.label}, {name}", "MB", memory, None)
