"""The card of a published model: README.md in the form of the Hugging Face Hub."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.settings import UnetSettings
from jobs.evaluate.report import judged
from jobs.experiments import experiment_json
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.experiment_json import MAY_CHANGE
from jobs.experiments.table import EXPERIMENTS
from jobs.sample.classes import label, predictions
from jobs.sample.sample_set import DRAWN, SampleSet, SampleSettings, hashes_in
from jobs.storage import checkpoints
from jobs.storage.provenance import versions
from jobs.storage.run_folder import RunFolder

TASK = "unconditional-image-generation"


def card(
    run: RunFolder,
    experiment: str,
    config: ExperimentConfig,
    settings: SampleSettings,
    samples: SampleSet | None,
    license_id: str,
    hashes: Mapping[str, str],
) -> str:
    """Writes README.md; `samples` are examples, and `hashes` those of the other files of the folder."""
    results = evaluation(samples) if samples is not None else {}
    parts = [
        f"---\n{_header(run, experiment, config, results, license_id)}\n---",
        f"# {run.label}",
        f"A diffusion model, trained as `{experiment}` of diffusion-launcher, of which nothing is needed to use it.",
        *(["![samples](samples.png)"] if "samples.png" in hashes else []),
        _facts(experiment, config, settings),
        _use(config, settings),
        *([_numbers(results)] if results else []),
        "## Files\n\n" + _table(("file", "sha256"), [(f"`{name}`", f"`{value}`") for name, value in hashes.items()]),
        f"The licence of the weights is `{license_id}`; that of `generate.py` and `sampling/` is MIT.",
    ]
    return "\n\n".join(parts) + "\n"


def evaluation(samples: SampleSet) -> dict[str, Any]:
    """What `evaluate` has found about these samples; {} if it has not, or if they are other ones by now."""
    try:
        found = json.loads((samples.folder / "metrics.json").read_text())
        ours = found["protocol"]["sha256"]["samples"] == hashes_in(samples.read_manifest())[DRAWN]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return dict(found) if ours else {}


def _header(
    run: RunFolder, experiment: str, config: ExperimentConfig, results: Mapping[str, Any], license_id: str
) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData  # here, because it takes a while to import

    is_image, is_told = isinstance(config.model, UnetSettings), config.num_classes > 0
    found = [
        EvalResult(TASK, experiment, experiment, name, metric["value"], metric_name=metric["label"])
        for name, metric in results.get("metrics", {}).items()
    ]
    data = ModelCardData(
        license=license_id,
        library_name="pytorch",
        tags=["diffusion", "ddpm", "safetensors", *(["classifier-free-guidance"] if is_told else [])],
        # The Hub has no task for images of a given class, nor for plain numbers.
        pipeline_tag=TASK if is_image and not is_told else None,
        model_name=run.label,
        eval_results=found if is_image and found else None,
    )
    return str(data.to_yaml())


def _facts(experiment: str, config: ExperimentConfig, settings: SampleSettings) -> str:
    """What was trained on what, and how: a table."""
    train, sampler = config.train, settings.sampler
    network = "denoising-diffusion-pytorch's U-Net" if isinstance(config.model, UnetSettings) else "MLP"
    numbers = ", ".join(f"{name}={value}" for name, value in vars(config.model).items())
    told, evaluations = _told(settings.as_json()), settings.evaluations
    if settings.compile:
        told += "; compiled, which `generate.py` is not, so its samples differ by rounding"
    rows = [
        ("data", f"{config.data.about} Their sha256: `{config.data.digest(inception=False)['data']}`"),
        ("network", f"{network} with {numbers}; it predicts the noise"),
        ("process", f"{config.diffusion.timesteps:,} noise levels, {config.diffusion.beta_schedule} schedule"),
        ("training", f"{settings.step:,} steps of {train.batch_size}; the weights are their moving average"),
        ("command", f"`{_command(experiment, config)}`"),
        (
            "sampler",
            f"`{sampler.sampler}` with {evaluations} network evaluations, in {settings.precision}{told}",
        ),
    ]
    return _table(("what", "is"), rows)


def _command(experiment: str, config: ExperimentConfig) -> str:
    """The command that trains such a model, without what leaves the result alone, such as paths."""
    words, preset = ["python launch.py train", experiment], EXPERIMENTS[experiment].preset
    if getattr(preset.data, "root", None) == "":  # whoever runs it has to name their own
        words.append("--data.root YOUR_IMAGES")
    for flag, _, value in sorted(experiment_json.differences(preset, config)):
        section, _, name = flag.rpartition(".")
        if flag in MAY_CHANGE:
            continue
        if isinstance(value, bool):
            words.append(f"--{section}.{'' if value else 'no-'}{name}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return " ".join(words)


def _use(config: ExperimentConfig, settings: SampleSettings) -> str:
    """How to draw samples, and how to load the weights."""
    model, known = config.model, versions()
    packages, told = ["torch", "safetensors", "numpy"], ""
    text = "Sample i depends on the weights, `config.json`, the seed and i alone."
    if settings.classes:
        told = f" --classes {settings.classes[0]} --guidance {settings.guidance:g}"
        text += (
            f" `--classes 0-{config.num_classes - 1}` draws all classes in turn, and `arr_1` says which; "
            "`--guidance 0` is without classes, 1 the class as it is, and more exaggerates it."
        )
    if isinstance(model, UnetSettings):
        packages.append(f"denoising-diffusion-pytorch=={known['denoising-diffusion-pytorch']}")
        channels = config.data.sample.shape[-1] * model.patch_size**2
        module, size = "denoising_diffusion_pytorch", f"dim={model.dim}"
        if settings.classes:
            module, size = f"{module}.classifier_free_guidance", f"{size}, num_classes={config.num_classes}"
        heads = f", attn_heads={model.attn_heads}" if model.attn_heads else ""
        text += f"""

The network is the library's own; `generate.py` says how it takes images and what it predicts:

```python
from {module} import Unet
from safetensors.torch import load_file

unet = Unet({size}, dim_mults={model.dim_mults}, channels={channels}{heads})
unet.load_state_dict(load_file("{checkpoints.EMA}"))
```"""
    return f"""## Use

```sh
pip install {" ".join(packages)}   # made with torch {known["torch"]}
python generate.py --num-samples 16{told}
```

{text}"""


def _told(drawn: Mapping[str, Any]) -> str:
    """Says which classes were drawn, if there are some, and what led the predictions."""
    classes, weak = drawn.get("classes"), drawn.get("autoguidance")
    told = f", of classes {label(tuple(classes))} in turn with guidance {drawn['guidance']:g}" if classes else ""
    return f"{told}, with autoguidance {weak['scale']:g} by the weights of step {weak['step']:,}" if weak else told


def _numbers(results: Mapping[str, Any]) -> str:
    """The metrics beside their intervals and floors, and what they rest on."""

    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"

    rows = [
        (
            metric["label"],
            f"{metric['value']:.4g}",
            interval(metric["low"], metric["high"]),
            interval(metric["floor_low"], metric["floor_high"])
            or ("" if metric["floor"] is None else f"{metric['floor']:.4g}"),
        )
        for metric in results["metrics"].values()
    ]
    protocol = results["protocol"]
    drawn = protocol["samples"]
    sampler, told = drawn["sampler"], _told(drawn)
    evaluations = sampler["steps"] * predictions(drawn.get("guidance"), bool(drawn.get("autoguidance")))
    hashes = ", ".join(f"{name} `{value}`" for name, value in protocol["sha256"].items())
    return f"""## Numbers

{_table(("metric", "value", "95% interval", "floor"), rows)}

The floor is the value of a perfect model with as many samples. Measured on {judged(results)} of
`{sampler["sampler"]}` with {evaluations} network evaluations and seed {drawn["seed"]}{told}, by version
{protocol["version"]} of the metrics. sha256: {hashes}."""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    # chr(92) is a backslash, which Python 3.11 does not take inside the braces of an f-string.
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
