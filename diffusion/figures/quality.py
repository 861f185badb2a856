"""Figures of evaluations: quality against the number of network evaluations, or against guidance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from diffusion.figures.style import PALETTE, new_figure, save
from diffusion.settings import SAMPLERS

COLORS = dict(zip(SAMPLERS, PALETTE, strict=False))
"""The colour of each sampler, the same in all figures."""
Row = Mapping[str, Any]
Over = Literal["guidance", "evaluations"]
MARKERS = ("o", "s", "^", "D", "v")
"""Tell lines of one sampler with several guidances, of either kind, apart."""


def sampler_errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """W1 errors by the number of network evaluations: of the model, of the exact denoiser, and of exact samples.

    A row holds sampler, steps, eta, and the fields of `SamplerErrors`.
    """
    figure, axes = new_figure()
    handles = []
    for name, color in COLORS.items():
        # A set that was drawn with an eta has one row of its own, which would bend the line of eta 0.
        line = sorted((row for row in rows if row["sampler"] == name and not row["eta"]), key=lambda row: row["steps"])
        steps = [row["steps"] for row in line]
        axes.plot(steps, [row["total"] for row in line], "o-", color=color, linewidth=2)
        axes.plot(
            steps, [row["sampler_alone"] for row in line], "o--", color=color, linewidth=1.5, markerfacecolor="white"
        )
        handles.append(Line2D([], [], color=color, linewidth=2, label=name))
    # Samplers without chance have floor 0, which has no place on a logarithmic axis.
    floor = [(row["steps"], row["floor"]) for row in rows if row["floor"] > 0 and not row["eta"]]
    axes.plot(*zip(*sorted(floor), strict=True), ":", color="grey", linewidth=1.5)
    # The legend explains colours and styles apart: an entry for each pair would be twice as long.
    chance = ", ".join(name for name, kind in SAMPLERS.items() if not kind.is_deterministic)
    handles += [
        Line2D([], [], color="black", marker="o", label="trained network"),
        Line2D([], [], color="black", linestyle="--", marker="o", markerfacecolor="white", label="exact denoiser"),
        Line2D([], [], color="grey", linestyle=":", label=f"chance alone ({chance})"),
    ]
    axes.set(
        title="Error of the samplers, with the trained network and without its error", ylabel="W1 to the exact answer"
    )
    evaluations_axis(axes, sorted({row["steps"] for row in rows}))
    axes.set_yscale("log")
    axes.legend(handles=handles, frameon=False, ncols=2)
    save(figure, path)


def quality(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Metrics of sets of samples by their network evaluations, with intervals; grey is what a perfect model has.

    Sets of one number of steps that differ in guidance are drawn over guidance. `quality_rows` in
    jobs/evaluate/report.py makes the rows.
    """
    figure = Figure(figsize=(5 * len(names), 4.5), layout="constrained")
    over, lines = quality_lines(rows)
    of = {row["way"]: row["sampler"] for row in rows}
    # What tells lines of one sampler apart, the same for all samplers.
    kinds = list(dict.fromkeys((way.removeprefix(of[way]), scale) for way, scale in lines))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        metrics = [row["metrics"][name] for row in rows]
        # The floor depends on the number of samples, and sets may differ in it: the band holds the floors of all.
        axes.axhspan(
            min(metric["floor_low"] for metric in metrics),
            max(metric["floor_high"] for metric in metrics),
            color="grey",
            alpha=0.25,
            label="a perfect model",
        )
        for (way, scale), own in lines.items():
            found = [row["metrics"][name] for row in own]
            axes.errorbar(
                [row[over] for row in own],
                [metric["value"] for metric in found],
                [[m["value"] - m["low"] for m in found], [m["high"] - m["value"] for m in found]],
                fmt=MARKERS[kinds.index((way.removeprefix(of[way]), scale)) % len(MARKERS)] + "-",
                color=COLORS[of[way]],
                linewidth=2,
                capsize=4,
                label=way if scale is None else f"{way}, guidance {scale:g}",
            )
        axes.set(title=metrics[0]["label"])
        values = [metric["value"] for metric in metrics]
        # Ticks of a logarithmic axis say little where values span less than a decade.
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        ticks = sorted({row[over] for row in rows})
        if over == "guidance":
            axes.set(xlabel="guidance", xticks=ticks)
        else:
            evaluations_axis(axes, ticks)
        axes.legend(framealpha=0.8, fontsize="small")
    save(figure, path)


def quality_lines(rows: Sequence[Row]) -> tuple[Over, dict[tuple[str, float | None], list[Row]]]:
    """Returns over what sets of samples are drawn, and the sets of each line, by the way they were drawn and guidance.

    Guidance is None where it tells no lines apart.
    """
    scales = {row["guidance"] for row in rows}
    ways = sorted({row["way"]: [*SAMPLERS].index(row["sampler"]) for row in rows}.items(), key=lambda way: way[::-1])
    is_over_guidance = len(scales) > 1 and len({(row["way"], row["steps"]) for row in rows}) == len(ways)
    over: Over = "guidance" if is_over_guidance else "evaluations"
    told = sorted(scales) if len(scales) > 1 and not is_over_guidance else [None]
    lines = {}
    for way, _ in ways:
        for scale in told:
            own = [row for row in rows if row["way"] == way and scale in (None, row["guidance"])]
            if own:
                lines[way, scale] = sorted(own, key=lambda row: float(row[over] or 0))
    return over, lines


def evaluations_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Makes network evaluations the horizontal axis, and labels each number that occurs."""
    axes.set(xlabel="network evaluations for each sample", xscale="log")
    axes.set_xticks(steps)
    # A logarithmic axis would write powers of ten, and add ticks of its own between these.
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
