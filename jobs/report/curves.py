"""The curves of a report: one run's, or several runs' on one axis. Imported by `report` alone: Bokeh takes a second."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, NumeralTickFormatter
from bokeh.models.annotations import Legend, Span
from bokeh.plotting import figure

from jobs.report.contents import Content, Json

COLORS = ("#4c78c8", "#dd8452", "#3fa46a", "#d1495b", "#8f79c4", "#a3785f", "#d977b5", "#8c8c8c", "#b5a33c", "#3fa9c2")
"""Those of the figures of a run, a bit stronger, so that they are seen on light and on dark."""
CURVE, FLOOR = COLORS[0], COLORS[2]
HELD_OUT = "held out, averaged weights"
"""Names the curve of the held-out loss beside that of the training loss, as training.png does."""
JUDGED = "samples"
"""Names the curve of a metric beside its interval and floor."""
POINTS = 1200
"""So many points of a curve are kept: more than a screen can show."""


Scale = Literal["linear", "log"]


class Point(NamedTuple):
    """A logged value of a step, and the running mean there."""

    step: int
    value: float
    mean: float


def points(lines: Sequence[Json], name: str) -> list[Point]:
    """Returns a quantity by step with its mean over the last 5% of the lines; lines without it are left out."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    # A mean is a difference of two sums from the beginning: its cost does not depend on the width.
    sums = [0.0, *accumulate(value for _, value in found)]
    width = max(1, len(found) // 20)
    return [
        Point(step, value, (sums[i + 1] - sums[max(0, i + 1 - width)]) / (i + 1 - max(0, i + 1 - width)))
        for i, (step, value) in enumerate(found)
    ]


def without_noise(lines: Sequence[Json], name: str) -> list[Point]:
    """Returns a quantity that needs no running mean."""
    return [point._replace(mean=point.value) for point in points(lines, name)]


def excess(run: Content) -> list[Point]:
    """Returns the loss above the smallest one that any network can reach; [] where nobody knows that."""
    floor = run.floor
    return (
        [] if floor is None else [Point(p.step, p.value - floor, p.mean - floor) for p in points(run.history, "loss")]
    )


def rate(run: Content) -> list[Point]:
    return points([line for line in run.timing if line["event"] == "progress"], "images_per_s")


def qualities(lines: Sequence[Json]) -> dict[str, dict[str, list[Point]]]:
    """Returns the curves of each metric of quality.jsonl, by its label: the values, their interval and the floor."""
    metrics = {name: metric["label"] for line in lines for name, metric in line["metrics"].items()}
    names = {JUDGED: "value", "95% from": "low", "to": "high", "floor": "floor"}
    return {
        label: {
            title: without_noise([{"step": line["step"], **line["metrics"].get(name, {})} for line in lines], key)
            for title, key in names.items()
        }
        for name, label in metrics.items()
    }


def points_of(runs: int) -> int:
    """How many points of a curve are kept on a page about so many runs."""
    return max(200, POINTS // runs)


def thin(found: Sequence[Point], most: int) -> list[Point]:
    """Keeps at most `most` points: of each stretch its smallest and its largest value, so that no peak is lost."""
    if len(found) <= most:
        return list(found)
    stretches = most // 2
    edges = [round(i * len(found) / stretches) for i in range(stretches + 1)]
    kept: list[Point] = []
    for start, stop in pairwise(edges):
        stretch = range(start, stop)
        ends = {min(stretch, key=lambda i: found[i].value), max(stretch, key=lambda i: found[i].value)}
        kept += [found[i] for i in sorted(ends)]
    return kept


def of_run(run: Content, most: int) -> dict[str, Any]:
    """Returns the figures of a run by their titles, with `most` points of each curve. They are zoomed together.

    What the run has not recorded has no figure.
    """
    steps = DataRange1d(range_padding=0.02)
    loss, held_out = points(run.history, "loss"), without_noise(run.history, "held_out_loss")
    names = sorted({name for line in run.history for name in line if name.startswith("loss_t")})
    bands = {f"t < {i + 1}/{len(names)} T": points(run.history, name) for i, name in enumerate(names)}
    quantities: dict[str, tuple[Mapping[str, Sequence[Point]], Scale]] = {
        "Training loss": ({"in training": loss, HELD_OUT: held_out} if held_out else {"": loss}, "log"),
        "Excess loss: above the smallest loss that any network can reach": ({"": excess(run)}, "log"),
        "Loss by noise level": (bands, "log"),
        "Norm of the gradient before clipping": ({"": points(run.history, "grad_norm")}, "log"),
        "Learning rate": ({"": without_noise(run.history, "lr")}, "linear"),
        "Images per second": ({"": rate(run)}, "linear"),
        **{f"{title} while it trains": (judged, "log") for title, judged in qualities(run.quality).items()},
    }
    figures = {}
    for title, (curves, scale) in quantities.items():
        if any(curves.values()):
            figures[title] = _figure(curves, scale, steps, most, with_values=curves is not bands)
            _mark_restarts(figures[title], run.starts)
    if run.floor is not None and "Training loss" in figures:
        figures["Training loss"].add_layout(
            Span(location=run.floor, dimension="width", line_color=FLOOR, line_width=2, line_dash="dashed")
        )
    return figures


def compared(runs: Sequence[Content]) -> dict[str, Any]:
    """Returns figures with the running means of all runs on one axis, by their titles."""
    steps = DataRange1d(range_padding=0.02)

    def of_all(curve: Callable[[Content], list[Point]]) -> dict[str, list[Point]]:
        return {run.label: curve(run) for run in runs}

    quantities: dict[str, tuple[Mapping[str, Sequence[Point]], Scale]] = {
        "Training loss": (of_all(lambda run: points(run.history, "loss")), "log"),
        "Held-out loss of the averaged weights": (
            of_all(lambda run: without_noise(run.history, "held_out_loss")),
            "log",
        ),
        "Excess loss": (of_all(excess), "log"),
        "Norm of the gradient before clipping": (of_all(lambda run: points(run.history, "grad_norm")), "log"),
        "Images per second": (of_all(rate), "linear"),
    }
    judged = {run.label: qualities(run.quality) for run in runs}
    for title in dict.fromkeys(title for of_run in judged.values() for title in of_run):
        values = {label: of_run[title][JUDGED] for label, of_run in judged.items() if title in of_run}
        quantities[f"{title} while it trains"] = (values, "log")
    return {
        title: _figure(curves, scale, steps, points_of(len(runs)), with_values=False)
        for title, (curves, scale) in quantities.items()
        if any(curves.values())
    }


def note(runs: Sequence[Content]) -> str:
    """Says how many points the curves show, if that is not all of them."""
    longest = max(len(run.history) for run in runs)
    if longest <= points_of(len(runs)):
        return ""
    return f"Of up to {longest:,} logged steps a curve shows the smallest and the largest value of each stretch."


def _figure(
    curves: Mapping[str, Sequence[Point]], scale: Scale, steps: DataRange1d, most: int, *, with_values: bool
) -> Any:
    """Draws running means by step, of each curve `most` points; `with_values` also the values themselves, fainter."""
    plot = figure(
        height=280,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=DataRange1d(start=0) if scale == "linear" else DataRange1d(),
        y_axis_type=scale,
        x_axis_label="step (optimizer updates)",
        tools="box_zoom,xwheel_zoom,reset",
        active_drag=None,  # a finger that scrolls the page must not zoom
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    if scale == "linear":
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00000]")
    named = len(curves) > 1
    lines: list[tuple[str, list[Any]]] = []
    for color, (name, curve) in zip(COLORS * len(curves), curves.items(), strict=False):
        shown = thin(curve, most)
        # A logarithm has no place for what is not above zero: there the curve has a gap.
        above = [point if scale == "linear" or point.mean > 0 else point._replace(mean=math.nan) for point in shown]
        columns: dict[str, list[float]] = {
            "step": [point.step for point in shown],
            "mean": [point.mean for point in above],
        }
        if with_values:
            columns["value"] = [point.value for point in shown]
        source = _source(columns)
        drawn = [plot.line("step", "value", source=source, color=color, alpha=0.3)] if with_values else []
        line = plot.line("step", "mean", source=source, color=color, line_width=2)
        lines.append((name, [*drawn, line]))
        if len(shown) == 1:  # a line of one point cannot be seen
            plot.scatter("step", "mean", source=source, color=color, size=6)
    tips = {"value": "value", "running mean": "mean"}
    if named:
        # One tip for all of them, on a line that nobody sees: a tip for each would cover the others.
        source, tips = _source(_side_by_side(curves, most // 2)), {name: f"c{i}" for i, name in enumerate(curves)}
        line = plot.line("step", "place", source=source, alpha=0)
    shown_tips = [("step", "@step{0,0}"), *((name, f"@{column}{{0.[000000]}}") for name, column in tips.items())]
    plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=shown_tips, visible=False))
    if named:
        legend = Legend(
            items=lines,
            orientation="horizontal",
            nrows=-(-len(curves) // 2),
            click_policy="hide",
            background_fill_alpha=0.0,
            border_line_color=None,
            margin=0,
        )
        plot.add_layout(legend, "below")
    return plot


def _source(columns: Mapping[str, Sequence[float]]) -> ColumnDataSource:
    """Holds columns as 4 bytes a number: as text they would be four times as much of the page."""
    arrays = {name: np.array(column, np.int32 if name == "step" else np.float32) for name, column in columns.items()}
    return ColumnDataSource(arrays)


def _side_by_side(curves: Mapping[str, Sequence[Point]], most: int) -> dict[str, list[float]]:
    """Returns the means of several curves at the same steps in columns c0, c1, ...; NaN where a curve has ended."""
    steps = sorted({point.step for curve in curves.values() for point in curve})
    steps = steps[:: -(-len(steps) // most)]
    columns: dict[str, list[float]] = {"step": list(steps)}
    for i, curve in enumerate(curves.values()):
        known = [point.step for point in curve]
        # Curves have points at different steps, so each gives its newest value up to this one.
        places = [bisect_right(known, step) - 1 for step in steps]
        columns[f"c{i}"] = [
            curve[at].mean if at >= 0 and step <= known[-1] else math.nan
            for at, step in zip(places, steps, strict=True)
        ]
    means = zip(*(columns[f"c{i}"] for i in range(len(curves))), strict=True)
    # Above 0, because a logarithmic axis has no place for others.
    columns["place"] = [next((mean for mean in row if mean > 0), math.nan) for row in means]
    return columns


def _mark_restarts(plot: Any, starts: Sequence[Json]) -> None:
    for line in starts:
        if line.get("restarts", 0) > 0:
            mark = Span(location=line["step"], dimension="height", line_color=FLOOR, line_dash="dotted", line_width=1.5)
            plot.add_layout(mark)
