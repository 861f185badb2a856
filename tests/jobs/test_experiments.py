"""Settings on disk: what a run of an older version holds is read as it was meant."""

import json

import pytest

from diffusion.errors import UserError
from jobs.experiments.experiment_json import FORMAT, read, write
from jobs.experiments.table import EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_was_written_is_read(experiment: str) -> None:
    preset = EXPERIMENTS[experiment].preset
    assert read(write(experiment, preset)) == (experiment, preset)


def test_a_setting_that_came_later_has_its_default() -> None:
    values = json.loads(write("mnist", EXPERIMENTS["mnist"].preset))
    del values["train"]["cuda_graph"], values["model"]["noise_skip"]
    _, config = read(json.dumps(values))
    assert config == EXPERIMENTS["mnist"].preset


@pytest.mark.parametrize(("before", "now"), [(True, "auto"), (False, "never")])
def test_what_was_a_flag_has_its_meaning(before: bool, now: str) -> None:
    values = json.loads(write("mnist", EXPERIMENTS["mnist"].preset))
    values["train"]["cuda_graph"] = before
    assert read(json.dumps(values))[1].train.cuda_graph == now


@pytest.mark.parametrize(
    ("most", "before", "shards"),
    [
        (None, None, None),
        (None, 2, 2),
        (32, None, 2),
        (24, None, 2),
        (20, None, 3),
        (20, 2, 4),
        (5, 3, 12),
        (48, 1, 1),
        (1, None, 48),
    ],
)
def test_a_run_that_took_some_examples_at_a_time_takes_no_more(
    most: int | None, before: int | None, shards: int | None
) -> None:
    """By more shards, for what was once a setting of its own."""
    values = json.loads(write("1d", EXPERIMENTS["1d"].preset))
    values["train"].update(batch_size=48, grad_shards=before, micro_batch_size=most)
    assert read(json.dumps(values))[1].train.grad_shards == shards


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train: train.pop("steps"), r"lacks the setting train\.steps"),
        (lambda train: train.update(grad_norm=3), r"holds a setting that this version no longer has: train\.grad-norm"),
        (lambda train: train.update(steps="many"), "wrong type"),
    ],
)
def test_what_does_not_fit_is_named(change: object, words: str) -> None:
    values = json.loads(write("1d", EXPERIMENTS["1d"].preset))
    change(values["train"])  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        read(json.dumps(values))


def test_the_format_has_a_number() -> None:
    values = json.loads(write("1d", EXPERIMENTS["1d"].preset))
    assert values["format"] == FORMAT
    with pytest.raises(UserError, match=f"of a newer version .* its format is {FORMAT + 1}, .* up to {FORMAT}"):
        read(json.dumps({**values, "format": FORMAT + 1, "train": {**values["train"], "new": 3}}))
    del values["format"]  # as before it had one
    assert read(json.dumps(values)) == ("1d", EXPERIMENTS["1d"].preset)
    del values["tracking"]["alerts"]
    assert not read(json.dumps(values))[1].tracking.alerts
