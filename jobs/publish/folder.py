"""The folder of a published model: what lies in it, and where that comes from. Imports no torch."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.settings import ClassMlpSettings, ClassUnetSettings, MlpSettings, UnetSettings
from jobs.evaluate.plan import complete_sets
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.table import EXPERIMENTS
from jobs.files import sha256, whole_folder
from jobs.publish import card
from jobs.sample import autoguidance, sample_set
from jobs.sample.sample_set import SampleSet, SampleSettings
from jobs.storage import checkpoints
from jobs.storage.checkpoints import Named
from jobs.storage.provenance import ROOT
from jobs.storage.records import precision_of
from jobs.storage.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    MlpSettings: HERE / "generate_1d.py",
    ClassMlpSettings: HERE / "generate_1d.py",
    UnetSettings: HERE / "generate_images.py",
    ClassUnetSettings: HERE / "generate_images.py",
}
"""The program of each kind of network."""
WEAK = "weak.safetensors"
"""The weights that autoguidance leads away from."""
_OWN = re.compile(r"^from ((?:diffusion|jobs)(?:\.\w+)*)\.(\w+) import", re.MULTILINE)
"""An import of one of our files."""


def code(config: ExperimentConfig) -> dict[str, str]:
    """generate.py and the files that it needs, which lie in the folder `sampling` beside it, by name.

    They are the files that `sample` runs; only the names in their imports are other ones.
    """
    if (program := PROGRAMS.get(type(config.model))) is None:
        raise UserError(f"export knows no program that draws without this project for {type(config.model).__name__}")
    found: dict[str, str] = {}
    todo = {"generate.py": program}
    while todo:
        name, path = todo.popitem()
        text = path.read_text()
        found[name] = _OWN.sub(r"from sampling.\2 import", text)
        for package, module in _OWN.findall(text):
            # Rooms are flattened there, so no two of these files may have the same name.
            if (needed := f"sampling/{module}.py") not in found:
                todo[needed] = ROOT / package.replace(".", "/") / f"{module}.py"
    return found


def publish(
    run: RunFolder, checkpoint: Named | None, license_id: str, target: Path, say: Callable[[str], None]
) -> None:
    """Makes the folder `target` of a checkpoint's averaged weights, whole or not at all.

    Raises UserError if something is there already, or if the run cannot be published.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another one")
    experiment, config = run.read_experiment()
    programs = code(config)
    step, manifest = checkpoints.choose(run.checkpoints, checkpoint, say)
    found = examples(run, manifest["files"][checkpoints.EMA]["sha256"], say)
    if found is None:
        say(f"The card has no picture and no numbers: no samples of step {step:,} are there; `sample` draws some.")
    elif changed := found.damaged():
        raise UserError(f"{changed[0]} has changed since it was written; draw it again with: {found.command}")
    settings = found.settings if found is not None else _default(run, experiment, config, step, say)
    # Older sets have "auto" here, which means the run's own.
    settings = replace(settings, precision=precision_of(run, settings.precision, "fp32"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as folder:
        _copy(run, step, settings.weights_sha256, folder / checkpoints.EMA)
        if (weak := settings.autoguidance) is not None:
            _copy(run, weak.step, weak.weights_sha256, folder / WEAK)
        for name, text in programs.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        (folder / "config.json").write_text(json.dumps(_config(experiment, config, settings), indent=2) + "\n")
        if found is not None and found.picture.exists():
            shutil.copyfile(found.picture, folder / "samples.png")
        # All of our files have a suffix, and folders have none.
        hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*.*"))}
        (folder / "README.md").write_text(card.card(run, experiment, config, settings, found, license_id, hashes))


def _copy(run: RunFolder, step: int, expected: str, target: Path) -> None:
    """Copies averaged weights; raises UserError where they are not those with this hash."""
    weights = run.checkpoints / checkpoints.folder_name(step) / checkpoints.EMA
    with suppress(FileNotFoundError):  # it has no hash then
        shutil.copyfile(weights, target)
    # The copy is hashed, so that what is published is what was verified, whatever happens to the run's own file.
    if not target.exists() or sha256(target) != expected:
        raise UserError(f"{weights} has changed meanwhile; run the command again")


def examples(run: RunFolder, weights_sha256: str, say: Callable[[str], None]) -> SampleSet | None:
    """The newest complete set that the weights with this hash have drawn, if possible one with numbers.

    Of compiled sets, whose bytes the published program does not draw, only if there are no others.
    """
    sets, ours = [], []
    for name in complete_sets(run):
        try:
            sets.append(sample_set.read(run, name))
        except UserError as error:  # of another version, or damaged
            say(f"The samples {name} are left out: {error}")
    sets.sort(key=lambda one: one.settings.compile)
    for one in sets:
        if one.settings.weights_sha256 == weights_sha256:
            try:
                if one.settings.autoguidance is not None:
                    autoguidance.check(run, one.settings.autoguidance, "ema")
                ours.append(one)
            except UserError as error:
                say(f"The samples {one.name} are left out: {error}")
    return next((one for one in ours if card.evaluation(one)), ours[0] if ours else None)


def _default(
    run: RunFolder, experiment: str, config: ExperimentConfig, step: int, say: Callable[[str], None]
) -> SampleSettings:
    """The settings of `sample` without options."""
    sampler = EXPERIMENTS[experiment].sampler
    sampler = replace(sampler, steps=min(sampler.steps, config.diffusion.timesteps))
    return sample_set.choose(run, seed=0, sampler=sampler, weights="ema", checkpoint=step, say=say)


def _config(experiment: str, config: ExperimentConfig, settings: SampleSettings) -> dict[str, Any]:
    """The content of config.json: what generate.py needs to know."""
    shape = config.data.sample.shape  # as in files
    return {
        "experiment": experiment,
        "weights": checkpoints.EMA,
        "sample_shape": (shape[-1], *shape[:-1]) if shape else (1,),
        "model": asdict(config.model),
        "diffusion": asdict(config.diffusion),
        "num_classes": config.num_classes,
        "sampler": asdict(settings.sampler),
        "classes": settings.classes,
        "guidance": settings.guidance,
        "autoguidance": {"scale": weak.scale, "weights": WEAK} if (weak := settings.autoguidance) is not None else None,
        "precision": settings.precision,
        "sub_batch_size": settings.sub_batch_size,
        "step": settings.step,
        "seed": settings.seed,
    }
