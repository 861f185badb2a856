"""Draws numbers with the model in this folder; needs torch, safetensors and numpy alone.

python generate.py --num-samples 16 writes generated.npz (arr_0: float32 [n]; arr_1: classes, if it has some).
"""

# SPDX-License-Identifier: MIT

import math
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.process.schedules import alphas_cumprod
from jobs.publish.drawing import arguments, draw, exact_numerics, save

FOLDER = Path(__file__).resolve().parent


class Mlp(nn.Module):
    """Predicts eps from x_t, a sinusoidal embedding of t and perhaps the class, through hidden layers with SiLU."""

    frequencies: Tensor  # [num_frequencies]

    def __init__(self, dim: int, layers: int, timesteps: int, num_classes: int, num_frequencies: int = 8) -> None:
        super().__init__()
        self.timesteps, self.num_classes = timesteps, num_classes
        widths = [1 + 2 * num_frequencies + num_classes, *[dim] * layers]
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.out = nn.Linear(dim, 1)
        self.register_buffer("frequencies", math.pi * torch.logspace(0, 1, num_frequencies), persistent=False)

    def forward(self, xt: Tensor, t: Tensor, *classes: Tensor) -> Tensor:
        """xt [batch, 1], t [batch] and, if there are some, classes [batch] to eps [batch, 1]; num_classes is none."""
        angles = (t.to(xt.dtype) / self.timesteps)[:, None] * self.frequencies
        ones = [(k[:, None] == torch.arange(self.num_classes, device=k.device)).to(xt.dtype) for k in classes]
        h = torch.cat([xt, angles.sin(), angles.cos(), *ones], dim=1)
        for layer in self.hidden:
            h = F.silu(layer(h))
        eps: Tensor = xt + self.out(h)
        return eps


def main() -> None:
    asked, config = arguments(FOLDER)
    exact_numerics(config["precision"])
    settings, diffusion = config["model"], config["diffusion"]
    network = Mlp(settings["dim"], settings["layers"], diffusion["timesteps"], config["num_classes"])
    network.load_state_dict(load_file(FOLDER / "ema.safetensors"))
    network.to(asked.device).eval()
    abar = alphas_cumprod(diffusion["beta_schedule"], diffusion["timesteps"])
    x0 = draw(network, abar, None, config, asked)
    save(x0[:, 0].float().cpu().numpy(), asked)
    print(f"{len(x0)} samples are in {asked.out}.")


if __name__ == "__main__":
    main()
