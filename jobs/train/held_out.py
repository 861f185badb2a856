"""The held-out loss: that of the averaged weights on examples that no training sees, at fixed timesteps and noise."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.noise_levels import NoiseLevels
from diffusion.process.randomness import Stream, normal, stratified
from jobs.runtime.world import World

CHUNK = 128
"""Examples that go through the network together. A constant: the last bits of the loss depend on it."""


class HeldOut:
    """Measures the same examples at the same timesteps, with the same noise, in every run with these noise levels.

    They are drawn as step 0 of seed 0, and a training draws steps from 1 on.
    """

    def __init__(
        self, experiment: Experiment, levels: NoiseLevels, build: Callable[[], DiffusionModel], world: World
    ) -> None:
        """`build` returns a model whose network has the averaged weights, now and when they have changed."""
        self._experiment, self._levels, self._build, self._world = experiment, levels, build, world

    @cached_property
    def _model(self) -> DiffusionModel:
        return self._build()

    @cached_property
    def _chunks(self) -> list[tuple[Tensor, ...]]:
        """x0 [n, *sample_shape], t [n], eps like x0 and what the network is told, in chunks."""
        x0, *told = self._experiment.held_out()
        u = stratified(0, Stream.TIMESTEP, 0, 0, len(x0), len(x0))
        t = torch.from_numpy(self._levels.timesteps(u))
        eps = torch.from_numpy(normal(0, Stream.NOISE, 0, 0, len(x0), tuple(x0.shape[1:])))
        return list(zip(*(part.split(CHUNK) for part in (x0, t, eps, *told)), strict=True))

    @torch.no_grad()
    def loss(self) -> float:
        """Returns the mean loss; every process must call it, for its share.

        Whoever computes a chunk gets the same bytes, and chunks are added up in their order.
        """
        world, device = self._world, self._world.device
        sums = torch.zeros(len(self._chunks), dtype=torch.float64, device=device)
        for i in range(world.rank, len(self._chunks), world.size):
            with world.accelerator.autocast():
                losses = self._model(*(part.to(device) for part in self._chunks[i]))
            _, t, *_ = self._chunks[i]
            sums[i] = (losses * self._levels.weights[t].to(device)).double().sum()
        # The other processes have zeros there, so to add them up changes no bits.
        return float(world.sum(sums).sum()) / sum(len(x0) for x0, *_ in self._chunks)
