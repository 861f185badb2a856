"""What the dashboard shows of the lines that a training writes."""

from collections import deque
from itertools import pairwise
from typing import Any

from jobs.storage.account import Account
from jobs.storage.run_folder import State


class Curves:
    """Turns lines of metrics.jsonl into what the dashboard shows.

    wandb makes a section of each first part of a name, in the order of the alphabet. People look at `generated`,
    `loss`, `loss_by_timestep`, `optimizer`, `quality`, `results`, `run`, `speed` and `time` in this order.
    """

    def __init__(self, timesteps: int, loss_floor: float | None) -> None:
        self._timesteps, self._floor = timesteps, loss_floor
        self._skipped = 0
        self._clipped: deque[int] = deque(maxlen=20)

    def row(self, line: dict[str, Any]) -> dict[str, Any]:
        """Returns what the dashboard shows of a line; call it with every line in turn, because it keeps sums."""
        loss, floor = line["loss"], self._floor
        self._skipped += line["skipped"]
        self._clipped.append(line["clipped"])
        bands = sorted(name for name in line if name.startswith("loss_t"))
        edges = [round(i * self._timesteps / len(bands)) for i in range(len(bands) + 1)]
        names = [f"loss_by_timestep/{low:04d}-{high - 1:04d}" for low, high in pairwise(edges)]
        return {
            "loss/train": loss,
            "loss/held_out": line.get("held_out_loss"),
            "loss/floor": floor,
            "loss/excess": None if loss is None or floor is None else loss - floor,
            "optimizer/learning_rate": line["lr"],
            "optimizer/ema_decay": line["ema_decay"],
            "optimizer/gradient_norm": line["grad_norm"],
            "optimizer/clipped_share": sum(self._clipped) / len(self._clipped),
            "optimizer/skipped_steps": self._skipped,
            **{name: line[band] for name, band in zip(names, bands, strict=True)},
        }


def timing_row(line: dict[str, Any], requeues: int) -> dict[str, Any]:
    """Returns what the dashboard shows of a line of timing.jsonl."""
    if line["event"] == "progress":
        seconds = ("step", "data", "compute", "communication", "checkpoint")
        return {
            "speed/images_per_s": line["images_per_s"],
            **{f"speed/{part}_s": line[f"{part}_s"] for part in seconds},
            "speed/memory_mb": line["memory_mb"],
        }
    if line["event"] == "start":
        return {"run/restarts": line["restarts"], "run/processes": line.get("processes")}
    return {"run/requeues": requeues} if line["event"] == State.REQUEUED else {}


def quality_row(line: dict[str, Any]) -> dict[str, Any]:
    """Returns what the dashboard shows of a line of quality.jsonl."""
    return {
        f"quality/{name}" + (f"_{key}" if key != "value" else ""): metric[key]
        for name, metric in line["metrics"].items()
        for key in ("value", "low", "high", "floor")
    }


def account_row(spent: Account) -> dict[str, Any]:
    """Returns what the dashboard shows of how a run's time was spent."""
    seconds = {f"time/{part}_s": round(value, 3) for part, value in spent.seconds.items()}
    useful = {"time/useful_share": spent.seconds["useful"] / spent.whole_s} if spent.whole_s else {}
    return {**seconds, **useful, "time/redone_steps": spent.redone_steps}
