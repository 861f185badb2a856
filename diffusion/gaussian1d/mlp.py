"""The network of the 1D experiment, from scratch. A published model takes this file along (`export`)."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Predicts eps from x_t, a sinusoidal embedding of t and perhaps the class, through hidden layers with SiLU."""

    frequencies: Tensor  # [num_frequencies]

    def __init__(self, dim: int, layers: int, timesteps: int, num_classes: int = 0, num_frequencies: int = 8) -> None:
        super().__init__()
        self.timesteps, self.num_classes = timesteps, num_classes
        widths = [1 + 2 * num_frequencies + num_classes, *[dim] * layers]
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))
        self.out = nn.Linear(dim, 1)
        # From half a period to five over the whole process: eps* changes slowly with t.
        self.register_buffer("frequencies", math.pi * torch.logspace(0, 1, num_frequencies), persistent=False)

    def forward(self, xt: Tensor, t: Tensor, *classes: Tensor) -> Tensor:
        """xt [batch, 1], t [batch] and, where there are any, classes [batch] to eps [batch, 1]."""
        angles = (t.to(xt.dtype) / self.timesteps)[:, None] * self.frequencies
        # The columns of these ones in the first layer are the embeddings of the classes; no class has no ones.
        ones = [(k[:, None] == torch.arange(self.num_classes, device=k.device)).to(xt.dtype) for k in classes]
        h = torch.cat([xt, angles.sin(), angles.cos(), *ones], dim=1)  # [batch, 1 + 2 * num_frequencies + num_classes]
        for layer in self.hidden:
            h = F.silu(layer(h))
        # At large t eps is nearly x_t, and small errors there decide how many samples go to which component.
        eps: Tensor = xt + self.out(h)
        return eps
