"""The settings of a run in experiment.json, and which of them a continued run may change."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from diffusion.errors import UserError
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.settings import TrackingSettings, TrainSettings, may_change
from jobs.experiments.table import EXPERIMENTS

FORMAT = 6
"""Raise it when a setting comes, goes or changes its meaning.

1 had no number, 1 and 2 no alerts, 3 no noise levels; up to 4, what is compiled was true or false, and up to 5, what is
captured; checkpoints always had their steps and minutes.
"""


def write(experiment: str, config: ExperimentConfig) -> str:
    """The content of experiment.json."""
    return json.dumps({"format": FORMAT, "experiment": experiment, **dataclasses.asdict(config)}, indent=2) + "\n"


def read(text: str) -> tuple[str, ExperimentConfig]:
    """What `write` wrote; raises UserError for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise UserError(f"experiment.json must hold an object; got {type(values).__name__}")
    if (number := values.pop("format", 1)) not in range(1, FORMAT + 1):
        raise UserError(
            f"experiment.json is of a newer version of this program: its format is {number}, and this version reads "
            f"up to {FORMAT}"
        )
    if number < 3 and isinstance(values.get("tracking"), dict):
        values["tracking"].setdefault("alerts", False)  # whoever began such a run has not asked for any
    most = None
    if isinstance(train := values.get("train"), dict):
        most = train.pop("micro_batch_size", None)
        if isinstance(train.get("compile"), bool):
            train["compile"] = "always" if train["compile"] else "never"
        if isinstance(train.get("cuda_graph"), bool):
            train["cuda_graph"] = "auto" if train["cuda_graph"] else "never"
    experiment = values.pop("experiment", None)
    if experiment not in EXPERIMENTS:
        raise UserError(f"experiment must be one of {', '.join(EXPERIMENTS)}; got {experiment}")
    preset = EXPERIMENTS[experiment].preset
    narrower = {"data": type(preset.data), "model": type(preset.model)}
    config = _from_dict(ExperimentConfig, values, "", narrower)
    return experiment, config if most is None else replace(config, train=in_parts(config.train, most))


def missing(text: str) -> set[str]:
    """The settings of training that did not exist yet when this experiment.json was written."""
    return {setting.name for setting in dataclasses.fields(TrainSettings)} - json.loads(text).get("train", {}).keys()


def in_parts(train: TrainSettings, most: int) -> TrainSettings:
    """Cuts shards so small that none has more than `most` examples: a GPU takes as many at a time, and as much memory.

    Older versions had a setting for that, and added up parts of a shard one after the other, so bytes differ.
    """
    size, first = train.batch_size, train.grad_shards or 1
    # Multiples of the old number, so that as many processes as before still have equal shares.
    shards = next(n for n in range(first, size + 1, first) if size % n == 0 and size // n <= most)
    return replace(train, grad_shards=shards)


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[tuple[str, Any, Any]]:
    """(flag, old value, new value) of every setting that differs, named as on the command line."""
    a, b = flags(old), flags(new)
    return [(flag, a.get(flag), b.get(flag)) for flag in {**a, **b} if a.get(flag) != b.get(flag)]


def flags(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting by its flag, without the hyphens before it."""
    return _flatten(dataclasses.asdict(config))


MAY_CHANGE = {"data.root"} | {
    f"{section}.{setting.name.replace('_', '-')}"
    for section, settings in (("train", TrainSettings), ("tracking", TrackingSettings))
    for setting in dataclasses.fields(settings)
    if may_change(setting, on_purpose=False)
}
"""Settings that a continued run may change: they do not touch its result.

Where its data lie is one of them, because what they are is checked by their hashes.
"""


DECIDE_LOSS = ("data.", "diffusion.", "train.noise-levels")
"""How the flags begin that decide what a loss measures."""


def unlike(configs: Sequence[ExperimentConfig]) -> list[str]:
    """Returns in what settings differ that decides what losses measure: such losses are no better nor worse."""
    told = [flags(config) for config in configs]
    names = sorted(name for name in set().union(*told) - MAY_CHANGE if name.startswith(DECIDE_LOSS))
    found = [name for name in names if any(values.get(name) != told[0].get(name) for values in told)]
    return [*found, *(["data set"] if len({type(config.data) for config in configs}) > 1 else [])]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + _hyphens(key)
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _hyphens(name: str) -> str:
    """The name of a setting as on the command line."""
    return name.replace("_", "-")


C = TypeVar("C")


def _from_dict(cls: type[C], values: Any, prefix: str, narrower: Mapping[str, type] = MappingProxyType({})) -> C:
    """Builds nested dataclasses from JSON; raises UserError where names or types do not fit.

    `prefix` stands before the names of settings, as in `train.lr`. `narrower` holds the types of fields that are
    annotated with a base class.
    """
    types = {**get_type_hints(cls), **narrower}
    hints = {f.name: types[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"experiment.json must hold an object for {cls.__name__}; got {type(values).__name__}")
    # Not passed over: the run was begun with it, and without it would go on as another one.
    for name in sorted(values.keys() - hints.keys()):
        raise UserError(f"experiment.json holds a setting that this version no longer has: {prefix}{_hyphens(name)}")
    # A setting that is newer than the run has its default.
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}  # type: ignore[arg-type]
    for name in sorted(needed - values.keys()):
        raise UserError(f"experiment.json lacks the setting {prefix}{_hyphens(name)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _from_dict(hints[name], value, f"{prefix}{name}.")
        else:
            # JSON has no tuples, and settings are compared with those of the command line, which has.
            built[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**built)
    except TypeError as error:
        # Types are not looked at above: a wrong one shows where a setting's check compares it with a number.
        raise UserError(f"experiment.json holds a value of the wrong type: {error}") from error
