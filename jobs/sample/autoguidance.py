"""Which earlier checkpoint guides the sampling, and how strongly. Imports neither torch nor numpy."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from diffusion.errors import UserError
from diffusion.settings import require
from jobs.storage import checkpoints
from jobs.storage.checkpoints import CorruptCheckpoint
from jobs.storage.run_folder import RunFolder

SHARE = 4
"""The weak weights are those of about a quarter of the steps, which `mnist-small` was measured with."""


@dataclass(frozen=True)
class Autoguidance:
    """Predictions are led away from those of weaker weights (diffusion/process/guidance.py)."""

    scale: float
    step: int
    """Checkpoint of the weak weights; they are of the same kind as the others, averages or not."""
    weights_sha256: str

    @property
    def label(self) -> str:
        """Names it in file names."""
        return f"autoguidance{self.scale:g}-by-{self.step}"


def choose(
    run: RunFolder,
    step: int,
    weights: Literal["ema", "model"],
    *,
    scale: float | None,
    weak: int | None,
    default: float,
    keep_every: int,
    say: Callable[[str], None],
) -> Autoguidance | None:
    """How the checkpoint `step` is guided; None if it is not. Raises UserError where it cannot be.

    `scale` and `weak`, the step of the weak checkpoint, are None where the user names none. Else it is one of those
    that `keep_every` keeps, with at most half of the steps; where there is none the `default` is not guided, and says
    so. Others that happen to be there depend on when the training was interrupted.
    """
    asked = default if scale is None else scale
    require(math.isfinite(asked) and asked >= 1, "--autoguidance must be at least 1 and finite", asked)
    if asked == 1:
        require(weak is None, "--weak-checkpoint needs --autoguidance above 1", asked)
        return None
    held = checkpoints.steps(run.checkpoints)
    if weak is not None:
        listed = ", ".join(str(other) for other in held if other < step) or "none"
        rule = f"--weak-checkpoint must be a step before {step} that {run} holds ({listed})"
        require(weak in held and weak < step, rule, weak)
        return _guided_by(run, weak, weights, asked)
    kept = [other for other in checkpoints.firsts(held, keep_every) if 2 * other <= step]
    for other in sorted(kept, key=lambda other: abs(SHARE * other - step)):
        try:
            return _guided_by(run, other, weights, asked)
        except CorruptCheckpoint as error:
            say(f"WARNING: {error}; it cannot guide these samples, so another one does")
    lacking = f"{run} has kept no good checkpoint with at most half of the {step} steps (--train.keep-every)"
    if scale is not None:
        raise UserError(f"--autoguidance {scale:g} needs --weak-checkpoint, because {lacking}")
    say(f"{lacking}, so the samples are drawn without autoguidance.")
    return None


def check(run: RunFolder, guided: Autoguidance, weights: Literal["ema", "model"]) -> None:
    """Raises UserError if the weak weights, with which a set was begun, are not there any more."""
    with suppress(CorruptCheckpoint):
        if _guided_by(run, guided.step, weights, guided.scale) == guided:
            return
    raise UserError(
        f"the checkpoint of step {guided.step}, which guides these samples, is gone, or has changed; "
        "choose another --name, and --weak-checkpoint or --autoguidance 1"
    )


def _guided_by(run: RunFolder, weak: int, weights: Literal["ema", "model"], scale: float) -> Autoguidance:
    files = checkpoints.verify(run.checkpoints, weak)["files"]
    return Autoguidance(float(scale), weak, files[checkpoints.weights_file(weights)]["sha256"])
