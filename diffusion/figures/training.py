"""Figures that every training has, whatever it trains."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from diffusion.figures.style import EXACT, MODEL, PALETTE, save


def training(
    history: list[dict[str, Any]], timing: list[dict[str, Any]], path: Path, quality: Sequence[dict[str, Any]] = ()
) -> None:
    """Draws a training at a glance, from the lines of metrics.jsonl, timing.jsonl and quality.jsonl.

    Dotted lines mark restarts, a dashed one the smallest loss that any network can reach, where that is known.
    """
    # Before lines are left out below, because few of them have a held-out loss.
    held_out = [line for line in history if line.get("held_out_loss") is not None]
    # More points than the picture has pixels show nothing more, and take longer to draw.
    history = history[:: max(1, len(history) // 2000)]
    judged = list(dict.fromkeys(name for line in quality for name in line["metrics"]))
    rows = 2 + -(-len(judged) // 2)
    figure = Figure(figsize=(12, 3.5 * rows), layout="constrained")
    loss, bands, gradient, speed, *below = figure.subplots(rows, 2, sharex=True).flat
    for axes, name in zip_longest(below, judged):
        _quality(axes, [{"step": line["step"], **line["metrics"][name]} for line in quality if name in line["metrics"]])
    _curve(loss, history, "loss", "running mean")
    if held_out:
        steps, values = [line["step"] for line in held_out], [line["held_out_loss"] for line in held_out]
        loss.plot(steps, values, color=PALETTE[1], linewidth=1.5, marker=".", label="held out, averaged weights")
    loss.set(title="Loss", ylabel="mean squared error", yscale="log")
    loss.yaxis.set_major_formatter(ScalarFormatter())
    loss.yaxis.set_minor_formatter(ScalarFormatter())
    loss.tick_params(axis="y", which="minor", labelsize="small")
    names = sorted({name for line in history for name in line if name.startswith("loss_t")})
    for i, name in enumerate(names):
        _curve(bands, history, name, f"t < {i + 1}/{len(names)} T", color=f"C{i}", raw=False)
    bands.set(title="Loss by timestep t", yscale="log")
    bands.set_ylim(top=5 * bands.get_ylim()[1])  # room for the legend
    _curve(gradient, history, "grad_norm", "running mean")
    gradient.set(title="Norm of the gradient before clipping", xlabel="step (optimizer updates)", yscale="log")
    _curve(speed, [line for line in timing if line["event"] == "progress"], "images_per_s", "running mean")
    speed.set(title="Images per second", xlabel="step (optimizer updates)")
    speed.set_ylim(bottom=0)
    for axes in (gradient, speed):  # the row below them may be empty
        axes.tick_params(labelbottom=True)
    starts = [line for line in timing if line["event"] == "start"]
    if starts and (floor := starts[-1].get("loss_floor")) is not None:
        loss.axhline(floor, color=EXACT, linewidth=2, linestyle="--", label=f"exact optimum {floor:.4f}")
    restarts = [line["step"] for line in starts if line["restarts"] > 0]
    for axes in (loss, bands, gradient, speed):
        for i, step in enumerate(restarts):
            label = f"restarts: {len(restarts)}" if i == 0 and axes is loss else None
            axes.axvline(step, color=EXACT, linestyle=":", linewidth=1.5, label=label)
    for axes in (loss, bands):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(framealpha=0.8, fontsize="small", loc="upper right", ncols=2)
    save(figure, path)


def _quality(axes: Axes, lines: list[dict[str, Any]]) -> None:
    """Draws a metric of samples with its 95% interval, and its floor; nothing if there are no lines."""
    if not lines:
        axes.set_axis_off()
        return
    steps, values, low, high = ([line[name] for line in lines] for name in ("step", "value", "low", "high"))
    axes.fill_between(steps, low, high, color=MODEL, alpha=0.2, linewidth=0)
    axes.plot(steps, values, color=MODEL, linewidth=2, marker=".", label="samples, 95% interval")
    axes.axhline(lines[-1]["floor"], color=EXACT, linewidth=2, linestyle="--", label="a perfect model")
    axes.set(title=lines[-1]["label"], xlabel="step (optimizer updates)", yscale="log")
    axes.set_ylim(min(lines[-1]["floor"], *values) / 3, 3 * max(high))  # an interval may begin at 0
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.legend(framealpha=0.8, fontsize="small", loc="upper right")


def _curve(
    axes: Axes, lines: list[dict[str, Any]], name: str, label: str, color: Any = MODEL, raw: bool = True
) -> None:
    """Draws a quantity by step with its running mean; lines without it are left out."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if not points:
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    if raw:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    marker = "o" if len(points) == 1 else ""  # a line of one point cannot be seen
    smooth = _running_mean(values, max(1, len(values) // 20))
    axes.plot(steps, smooth, color=color, linewidth=2, marker=marker, label=label)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Returns the mean of the last `width` values at each place."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
