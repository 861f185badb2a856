"""Settings on disk: what a run of an older version holds is read as it was meant."""

import json

import pytest

from diffusion.errors import UserError
from jobs.experiments.experiment_json import read, write
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train: train.pop("steps"), "lacks the setting steps"),
        (lambda train: train.update(stepps=3), "does not know: stepps"),
        (lambda train: train.update(steps="many"), "wrong type"),
    ],
)
def test_what_does_not_fit_is_named(change: object, words: str) -> None:
    values = json.loads(write("1d", EXPERIMENTS["1d"].preset))
    change(values["train"])  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        read(json.dumps(values))
