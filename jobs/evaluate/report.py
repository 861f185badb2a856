"""Evaluations for a terminal: one of them, two side by side, or all sets of a run. Imports neither torch nor numpy."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jobs.evaluate.plan import Evaluation
from jobs.experiments.table import EXPERIMENTS
from jobs.sample.classes import label
from jobs.sample.sample_set import SampleSettings
from jobs.storage.run_folder import RunFolder
from jobs.terminal import tables

Json = Mapping[str, Any]


class MetricRow(NamedTuple):
    """A metric as people read it."""

    label: str
    value: str
    interval: str
    """Its 95% interval, empty where it has none."""
    floor: str
    """What a perfect model would have, empty where nobody knows."""
    is_at_floor: bool


def metric_rows(results: Json) -> dict[str, MetricRow]:
    """Returns every metric by its name, as people read it."""
    rows = {}
    for name, metric in results["metrics"].items():
        decimals = _decimals(metric)
        floor = _range(metric["floor_low"], metric["floor_high"], decimals)
        if not floor and metric["floor"] is not None:
            floor = f"{metric['floor']:.{decimals}f}" if metric["floor"] else "0"
        interval = _range(metric["low"], metric["high"], decimals)
        at_floor = bool(_reaches(metric, metric["floor_low"], metric["floor_high"]))
        rows[name] = MetricRow(metric["label"], f"{metric['value']:.{decimals}f}", interval, floor, at_floor)
    return rows


def title(evaluation: Evaluation) -> str:
    """Which samples these are, in a line."""
    samples = evaluation.samples
    where, results = f"{RunFolder(samples.run)}/samples/{samples.name}", evaluation.read()
    number = judged(results) if results else f"{samples.num_samples:,} samples"
    return f"{where}: {number}, {_drawn_by(samples.settings)}"


def _drawn_by(settings: SampleSettings) -> str:
    told = f", classes {label(settings.classes)}, guidance {settings.guidance:g}" if settings.classes else ""
    return f"{settings.sampler.label}{_guided(settings)}{told}{', compiled' if settings.compile else ''}"


def _guided(settings: SampleSettings) -> str:
    weak = settings.autoguidance
    return f", autoguidance {weak.scale:g} by step {weak.step}" if weak is not None else ""


def _auto(settings: SampleSettings, several: bool) -> str:
    """The same in few letters, with the weak checkpoint only if there are several."""
    if (weak := settings.autoguidance) is None:
        return ""
    return f", auto {weak.scale:g}" + (f" by {weak.step}" if several else "")


def num_judged(results: Json) -> int:
    """How many samples the numbers rest on; an earlier version has not said it."""
    return int(results.get("num_judged", results["protocol"]["samples"]["num_samples"]))


def judged(results: Json) -> str:
    """The same as people read it."""
    n, drawn = num_judged(results), results["protocol"]["samples"]["num_samples"]
    return f"{n:,} samples" if n == drawn else f"the first {n:,} of {drawn:,} samples"


def one(evaluation: Evaluation, width: int) -> str:
    """Shows every metric with its interval beside its floor, and the tables."""
    results = evaluation.read()
    rows = [
        (row.label, row.value + ("*" if row.is_at_floor else " "), row.interval, row.floor)
        for row in metric_rows(results).values()
    ]
    headers = ("METRIC", "VALUE ", "95% INTERVAL", "FLOOR")
    parts = [title(evaluation), tables.render(headers, rows, width=width, whole=("METRIC",))]
    parts.append(textwrap.fill(legend(results), width))
    parts += [_render(entry, width) for entry in results["tables"].values()]
    return "\n\n".join(parts)


def differences(a: Evaluation, b: Evaluation) -> dict[str, dict[str, Any]]:
    """Returns B minus A of each metric that both have, its 95% interval, and who is better if it excludes 0."""
    from diffusion.statistics.bootstrap import Estimate  # here, because the command line starts without numpy

    metrics_a, metrics_b = a.read()["metrics"], b.read()["metrics"]
    replicates_a, replicates_b = a.read_replicates(), b.read_replicates()
    found = {}
    for name in metrics_a.keys() & metrics_b.keys():
        value = metrics_b[name]["value"] - metrics_a[name]["value"]
        # Numbers without chance in them differ by just so much.
        low = high = value
        if name in replicates_a and name in replicates_b:
            of_b = Estimate(metrics_b[name]["value"], replicates_b[name])
            low, high = (of_b - Estimate(metrics_a[name]["value"], replicates_a[name])).interval()
        verdict = _verdict(low, high, metrics_a[name]["better"])
        found[name] = {"value": value, "low": low, "high": high, "verdict": verdict}
    # In the order of A: the set of common names has none.
    return {name: found[name] for name in metrics_a if name in found}


def two(a: Evaluation, b: Evaluation, width: int) -> str:
    """Shows two evaluations side by side, and which differences are larger than chance."""
    results_a, results_b = a.read(), b.read()
    metrics_a, metrics_b = results_a["metrics"], results_b["metrics"]
    rows = []
    for name, difference in differences(a, b).items():
        decimals = _decimals(metrics_a[name])
        values = [f"{metrics[name]['value']:.{decimals}f}" for metrics in (metrics_a, metrics_b)]
        interval = _range(difference["low"], difference["high"], decimals)
        rows.append((metrics_a[name]["label"], *values, interval, difference["verdict"]))
    headers = ("METRIC", "A", "B", "B - A, 95% INTERVAL", "BETTER")
    notes = [f"A  {title(a)}", f"B  {title(b)}"]
    sizes = num_judged(results_a), num_judged(results_b)
    if sizes[0] != sizes[1]:
        note = (
            f"A and B hold {sizes[0]:,} and {sizes[1]:,} samples, and chance makes distances larger where they are few."
        )
        notes.append(textwrap.fill(f"{note} Compare sets of equal size.", width))
    ways = [_drawn_by(evaluation.samples.settings) for evaluation in (a, b)]
    if ways[0] != ways[1]:
        note = f"A and B were not drawn in the same way: {ways[0]}; {ways[1]}."
        notes.append(textwrap.fill(note, width, break_on_hyphens=False))
    legend = "BETTER: the better one, if the interval of the difference excludes 0."
    return "\n\n".join(
        ["\n".join(notes), tables.render(headers, rows, width=width, whole=("METRIC", "BETTER")), legend]
    )


def quality(evaluations: Sequence[Evaluation], width: int) -> str:
    """Shows all sets by their samplers, steps and guidance, with the metrics that depend on samples."""
    rows = quality_rows(evaluations)
    names = headline(rows, 2 if width < 110 else 4)
    cells = []
    for row in rows:
        numbers = []
        for name in names:
            metric = row["metrics"][name]
            decimals = _decimals(metric)
            mark = "*" if row["as_reference"][name] else " "
            numbers.append(f"{metric['value']:.{decimals}f}{mark} {_range(metric['low'], metric['high'], decimals)}")
        told = () if row["guidance"] is None else (f"{row['guidance']:g}",)
        cells.append((row["way"], f"{row['evaluations']:,}", *told, f"{row['num_judged']:,}", *numbers))
    told = () if rows[0]["guidance"] is None else ("GUIDANCE",)
    headers = ("SAMPLER", "EVALS", *told, "N", *(name.upper() for name in names))
    shown = tables.render(headers, cells, width=width, whole=("SAMPLER",))
    reference = _reference(rows)
    least = ["the guidance nearest to 1"] if told else []
    if any(row["autoguidance"] for row in rows):
        least.append("the least autoguidance (auto)")
    of = "most network evaluations (EVALS)" + (f" of {' and '.join(least)}" if least else "")
    legend = f"* within the 95% interval of the set with {of}, or better: {reference['name']}"
    return f"{shown}\n\n{textwrap.fill(legend, width, break_on_hyphens=False)}"


def draw_quality(evaluations: Sequence[Evaluation], path: Path) -> None:
    """The same as a figure."""
    from diffusion.figures import quality  # here, because plotting libraries take a second to import

    rows = quality_rows(evaluations)
    quality.quality(rows, headline(rows, 2), path)


def headline(rows: Sequence[Json], number: int) -> list[str]:
    """Returns the names of the metrics that stand for all others: the first ones."""
    return list(rows[0]["metrics"])[:number]


def quality_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Returns each set with sampler and metrics, sorted by network evaluations.

    Those count twice what `sample --steps` says where guidance takes two predictions, four times where both kinds do.
    """
    rows: list[dict[str, Any]] = []
    several = len({weak.step for one in evaluations if (weak := one.samples.settings.autoguidance)}) > 1
    for evaluation in evaluations:
        results, settings = evaluation.read(), evaluation.samples.settings
        sampler, guidance = settings.sampler, settings.guidance
        rows.append(
            {
                "name": evaluation.samples.name,
                **asdict(sampler),
                "way": sampler.sampler + _auto(settings, several),
                "evaluations": settings.evaluations,
                "guidance": guidance,
                "autoguidance": asdict(settings.autoguidance) if settings.autoguidance else None,
                "num_samples": evaluation.samples.num_samples,
                "num_judged": num_judged(results),
                "metrics": {
                    name: metric for name, metric in results["metrics"].items() if metric["floor_low"] is not None
                },
            }
        )
    rows.sort(key=lambda row: (row["evaluations"], row["way"], row["guidance"] or 0, row["name"]))
    reference = _reference(rows)["metrics"]
    for row in rows:
        row["as_reference"] = {
            name: _reaches(metric, reference[name]["low"], reference[name]["high"])
            for name, metric in row["metrics"].items()
        }
    return rows


def _reference(rows: Sequence[Json]) -> Json:
    """Returns the set with most network evaluations, the last of several; the least exaggerated one where some are."""

    def key(row: Json) -> tuple[float, float, int]:
        exaggerated = abs(row["guidance"] - 1) if row["guidance"] is not None else 0.0
        scale = row["autoguidance"]["scale"] if row["autoguidance"] else 1.0
        return -exaggerated, -scale, row["evaluations"]

    # `max` returns the first of several that are equal.
    return max(reversed(rows), key=key)


def _verdict(low: float, high: float, better: str) -> str:
    if low <= 0 <= high:
        return ""
    if better == "near":
        return "differ"
    return "B" if (high < 0) == (better == "lower") else "A"


def _reaches(metric: Json, low: float | None, high: float | None) -> bool | None:
    """Whether a value lies between these bounds, or is better; None where there are none."""
    if low is None or high is None:
        return None
    good_low = metric["better"] == "lower" or metric["value"] >= low
    good_high = metric["better"] == "higher" or metric["value"] <= high
    return bool(good_low and good_high)


def legend(results: Json) -> str:
    """Says how the metrics are to be read, and what is missing among them."""
    text = "FLOOR: the value of a perfect model with as many samples (95% range). *: within that range or better."
    if not results["protocol"]["weights_are_there"]:
        text += (
            " The checkpoint that drew these samples is gone, so metrics that need it (the loss, the likelihood) are "
            "left out."
        )
    if remark := EXPERIMENTS[results["protocol"]["experiment"]].preset.data.remark:
        text += f" {remark}"
    return text


def columns(entry: Json) -> dict[str, list[str]]:
    """Returns a table of an evaluation by its columns; those that are zero throughout are left out."""
    rows = entry["rows"]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return {name.replace("_", " "): [_cell(row[name]) for row in rows] for name in names}


def _render(entry: Json, width: int) -> str:
    shown = {name.upper(): cells for name, cells in columns(entry).items()}
    texts = [name.upper().replace("_", " ") for name, value in entry["rows"][0].items() if isinstance(value, str)]
    rows = list(zip(*shown.values(), strict=True))
    return f"{textwrap.fill(entry['title'], width)}\n{tables.render(list(shown), rows, width=width, whole=texts)}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _decimals(metric: Json) -> int:
    """Returns the number of decimals: two digits of the interval, or three of the distance to the floor."""
    for low, high in ((metric["low"], metric["high"]), (metric["floor_low"], metric["floor_high"])):
        if low is not None and high > low:
            # Half of the interval is about two standard errors. Further digits of the value would be chance.
            return _clamped(2 - math.ceil(math.log10((high - low) / 2)))
    distance = abs(metric["value"] - (metric["floor"] or 0))
    return _clamped(3 - math.ceil(math.log10(distance))) if distance else 3


def _clamped(decimals: int) -> int:
    return min(max(decimals, 0), 6)


def _range(low: float | None, high: float | None, decimals: int) -> str:
    if low is None or high is None:
        return ""
    return f"{low:.{decimals}f} to {high:.{decimals}f}" if low < high else f"{low:.{decimals}f}"
