"""A GPU computes what a CPU computes in float64, as well as the library does, alone and with others."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.images.experiment import library_unet
from diffusion.images.unet import with_fast_layers
from diffusion.settings import UnetSettings
from jobs.runtime.numerics import Kind, set_numerics
from jobs.storage.records import read_jsonl
from jobs.storage.run_folder import RunFolder
from slurm import local
from tests.gpu.jobs import GlooJob, dim
from tests.launching import TINY, done

IMAGES = 4
"""Of the network of `mnist` in float64, each takes a CPU seconds."""


def outcome(device: Kind, dtype: torch.dtype, *, channels: int, fast: bool, bf16: bool) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of all parameters in one vector, both in float64 on the CPU."""
    torch.manual_seed(0)
    network = library_unet(UnetSettings(dim=channels), image_channels=1)
    x, t = torch.randn(IMAGES, 1, 28, 28), torch.linspace(0, 999, IMAGES).long()
    network = with_fast_layers(network) if fast else network
    network = network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        y = network(x.to(device, dtype), t.to(device, dtype))
    y.double().square().sum().backward()
    return y.detach().double().cpu(), torch.cat([p.grad.double().cpu().flatten() for p in network.parameters()])


def test_outputs_and_gradients_are_those_of_float64(device: Kind) -> None:
    set_numerics("fp32")
    channels = dim(device)
    exact = outcome("cpu", torch.float64, channels=channels, fast=False, bf16=False)

    def errors(*, fast: bool, bf16: bool) -> Tensor:
        found = outcome(device, torch.float32, channels=channels, fast=fast, bf16=bf16)
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])

    assert (errors(fast=True, bf16=False) < torch.tensor([1e-5, 1e-4])).all()  # a gradient sums over all images
    ours, library = errors(fast=True, bf16=True), errors(fast=False, bf16=True)
    assert (ours < 2 * library).all(), (ours, library)
    assert (ours > 1e-4).all()  # else it was not bf16


def test_two_processes_on_one_device_agree_with_one(device: Kind, tmp_path: Path, mnist_root: Path) -> None:
    seen = {}
    for processes, captured in ((1, False), (2, False), (2, True)):
        folder = tmp_path / f"{processes}-{captured}"
        folder.mkdir()
        assert local.run(GlooJob(folder, mnist_root, device, processes, captured), processes).exit_code == 0
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
        assert found == seen.setdefault(processes, found)  # graphs around the exchange change no byte
    assert seen[2][0] == seen[2][1]
    # The same sums in another order.
    assert seen[2][0]["losses"] == pytest.approx(seen[1][0]["losses"], rel=1e-3)
    assert seen[1][0]["losses"][-1] < seen[1][0]["losses"][0]


def test_the_first_command_of_a_user_ends_with_figures(device: Kind, tmp_path: Path) -> None:
    rehearsal = () if device == "cuda" else (*TINY, "--train.steps", 300)
    ended = done("train", "1d", "--name", "a", *rehearsal, cwd=tmp_path, see_gpus=device == "cuda")
    run = RunFolder(tmp_path / "runs" / "1d" / "a")
    assert run.read_status()["state"] == "finished"
    assert str(next(line["device"] for line in read_jsonl(run.timing) if "device" in line)).startswith(device)
    assert {"training.png", "samples.png"} <= {path.name for path in run.figures.iterdir()}, ended.out
