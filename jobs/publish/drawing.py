"""Draws samples with a published model: sample i depends on the weights, config.json, the seed and i alone.

`export` copies this file, and those that it imports, beside the program that it belongs to.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import UserError
from diffusion.process.guidance import autoguided, guided
from diffusion.process.randomness import Stream, normal
from diffusion.process.samplers import FUNCTIONS, Clip, Denoiser
from jobs.sample.classes import check_guidance, parse


def arguments(folder: Path) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Reads the command line, and the config.json of the model in this folder."""
    config = json.loads((folder / "config.json").read_text())
    parser = argparse.ArgumentParser(description="Draws samples of the model in this folder.")
    parser.add_argument("--num-samples", type=count, default=16)
    parser.add_argument("--seed", type=seed, default=config["seed"], help="each seed gives other samples")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=npz_file, default="generated.npz", help="file that is written")
    if not (n := config["num_classes"]):
        return parser.parse_args(), config
    parser.add_argument("--classes", help=f"such as 7, 3,5 or 0-{n - 1}: sample i has the (i mod n)-th of these n")
    parser.add_argument("--guidance", type=float, default=config["guidance"], help="how far they are exaggerated")
    asked = parser.parse_args()
    try:
        asked.classes = config["classes"] if asked.classes is None else parse(asked.classes, n)
        check_guidance(asked.guidance)
    except UserError as error:
        parser.error(str(error))
    return asked, config


def count(text: str) -> int:
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {n}")
    return n


def seed(text: str) -> int:
    """A seed that the random number generator takes."""
    if not 0 <= (n := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 2^63 - 1; got {n}")
    return n


def device(text: str) -> torch.device:
    """A device on which torch can compute here."""
    try:
        torch.zeros(1, device=text).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three words for it
        raise argparse.ArgumentTypeError(f"must be a device that torch can use here; got {text}") from error
    return torch.device(text)


def npz_file(text: str) -> Path:
    """A path that numpy takes as it is, to another one it would add the suffix, and where a file can be written."""
    path = Path(text)
    if path.suffix != ".npz":
        raise argparse.ArgumentTypeError(f"must end in .npz; got {text}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that can be written to; got {text}")
    return path


def exact_numerics(precision: str) -> None:
    """Sets what equal bytes depend on: fp32 is IEEE fp32, and kernels add in a fixed order."""
    # The same as jobs/runtime/numerics.py, which would take half of the project along.
    # It is read once, when cuBLAS is first used: call this before anything is on a GPU.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def draw(
    load: Callable[[str], Callable[..., Tensor]],
    alphas_cumprod: Tensor,
    clip: Clip | None,
    config: Mapping[str, Any],
    asked: argparse.Namespace,
) -> Tensor:
    """Draws x0 [num_samples, *sample_shape], in the range that the network was trained on.

    `load` takes the name of a file of weights, and returns what predicts with them: a function of xt and t, and of
    classes if the model has some.
    """
    predict = load(config["weights"])
    if guide := config["autoguidance"]:
        predict = autoguided(predict, load(guide["weights"]), guide["scale"])
    is_bf16, sampler, size = config["precision"] == "bf16", config["sampler"], config["sub_batch_size"]

    def noise(first: int, stream: Stream, step: int) -> Tensor:
        numbers = normal(asked.seed, stream, step, first, first + size, tuple(config["sample_shape"]))
        return torch.from_numpy(numbers).to(asked.device)

    parts = []
    with torch.inference_mode(), torch.autocast(asked.device.type, torch.bfloat16, enabled=is_bf16):
        # Always full batches, because samples depend on their size in the last bits; the surplus is dropped.
        for first in range(0, asked.num_samples, size):
            later = partial(noise, first, Stream.SAMPLE_STEP)
            eps = predict
            if n := config["num_classes"]:
                classes = torch.from_numpy(classes_of(asked, first, first + size)).to(asked.device)
                eps = guided(predict, classes, n, asked.guidance)
            *_, x0 = FUNCTIONS[sampler["sampler"]](
                # On the host, because samplers read single numbers of it, and would wait for the GPU at each.
                Denoiser(eps, alphas_cumprod.double().cpu(), clip),
                noise(first, Stream.SAMPLE_START, 0),
                steps=sampler["steps"],
                noise=later,
                eta=sampler["eta"],
            )
            if not x0[: asked.num_samples - first].isfinite().all():
                raise SystemExit("error: what the network draws here is not finite, so nothing is written")
            parts.append(x0)
    return torch.cat(parts)[: asked.num_samples]


def save(samples: NDArray[Any], asked: argparse.Namespace) -> None:
    """Writes the samples as arr_0, and their classes, if there are some, as arr_1."""
    told = (classes_of(asked, 0, len(samples)),) if "classes" in asked else ()
    np.savez(asked.out, samples, *told)


def classes_of(asked: argparse.Namespace, start: int, stop: int) -> NDArray[np.int64]:
    """The classes of samples [start, stop)."""
    return np.array(asked.classes)[np.arange(start, stop) % len(asked.classes)]
