"""The 1D experiment from scratch: an MLP learns the diffusion of a Gaussian mixture, whose exact answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.gaussian1d import distances
from diffusion.gaussian1d.mixture import Mixture
from diffusion.gaussian1d.mlp import Mlp
from diffusion.process.guidance import of_class
from diffusion.process.model import DiffusionModel, Experiment
from diffusion.process.randomness import Stream, normal, uniform
from diffusion.process.samplers import Denoiser, Predict, dpm_solver
from diffusion.process.schedules import alphas_cumprod, alphas_cumprod_at
from diffusion.settings import ClassSettings, DiffusionSettings, MixtureSettings, MlpSettings

HELD_OUT = 8192
"""Draws that a training's held-out loss is the mean of."""


class Gaussian1dModel(DiffusionModel):
    """The MLP under the forward process."""

    def predict(self, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        eps: Tensor = self.network(xt, t, *self.told(xt, classes))
        return eps


class Gaussian1d(Experiment):
    """Samples of a mixture, [n, 1]."""

    sample_shape = (1,)
    clip = None

    def __init__(self, data: MixtureSettings, model: MlpSettings, diffusion: DiffusionSettings) -> None:
        self.mixture = Mixture.of(data)
        self.model_settings = model
        self.abar = alphas_cumprod(diffusion.beta_schedule, diffusion.timesteps)
        if isinstance(model, ClassSettings):
            self.num_classes, self.class_dropout = len(data.means), model.class_dropout

    def build_model(self) -> DiffusionModel:
        network = Mlp(self.model_settings.dim, self.model_settings.layers, len(self.abar), self.num_classes)
        return Gaussian1dModel(network, self.abar, self.num_classes)

    def batch(self, seed: int, step: int, start: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        u = torch.from_numpy(uniform(seed, Stream.COMPONENT, step, start, stop))
        z = torch.from_numpy(normal(seed, Stream.DATA, step, start, stop))
        return self.mixture.sample(u, z)[:, None].float().to(device)

    def classes(self, seed: int, step: int, start: int, stop: int, batch_size: int) -> NDArray[np.int64]:
        """Returns the components that `batch` has drawn."""
        return self.mixture.components(torch.from_numpy(uniform(seed, Stream.COMPONENT, step, start, stop))).numpy()

    def held_out(self) -> tuple[Tensor, ...]:
        drawn = 0, 0, 0, HELD_OUT, HELD_OUT  # a training draws steps from 1 on
        return self.batch(*drawn, torch.device("cpu")), *map(torch.from_numpy, self.told(*drawn))

    def to_array(self, x0: Tensor) -> NDArray[np.float32]:
        return x0[:, 0].float().cpu().numpy()

    def draw_samples(self, samples: NDArray[Any], path: Path, classes: NDArray[np.int64] | None = None) -> None:
        from diffusion.gaussian1d import figures  # here, because plotting libraries take a second to import

        figures.samples(self.mixture_of(classes), samples, path)

    def mixture_of(self, classes: NDArray[np.int64] | None) -> Mixture:
        """The exact distribution of samples of these classes [n]."""
        if classes is None:
            return self.mixture
        return self.mixture.of_classes(torch.from_numpy(np.bincount(classes, minlength=len(self.mixture.means))))

    def exact_predict(self, xt: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        """The perfect network, eps*(x_t); same signature as `predict`."""
        abar = alphas_cumprod_at(self.abar, t.double())[:, None]
        if classes is None:
            return self.mixture.eps(xt.double(), abar).to(xt.dtype)
        return self.mixture.eps_of_class(xt.double(), abar, classes[:, None]).to(xt.dtype)

    def report(self, model: DiffusionModel, folder: Path) -> list[str]:
        from diffusion.gaussian1d import figures

        floor = self.mixture.loss_floor(self.abar)
        excess = distances.excess_loss(model.predict_for, self.mixture, self.abar)
        x = self._draw(model.predict_for, 100_000)
        w1, w1_floor = distances.wasserstein1(x, self.mixture), distances.wasserstein1_floor(self.mixture, len(x))
        ks, ks_floor = distances.kolmogorov_smirnov(x, self.mixture), distances.kolmogorov_smirnov_floor(len(x))
        figures.forward_process(self.mixture, self.abar, folder / "forward.png")
        figures.reverse_process(model.predict_for, self.mixture, self.abar, folder / "reverse.png")
        figures.samples(self.mixture, x.numpy(), folder / "samples.png")
        figures.excess_loss(excess, floor, folder / "excess-loss.png")
        return [
            f"excess loss over the exact optimum {excess.mean():.5f} (the optimum itself has loss {floor.mean():.5f})",
            f"W1 of {len(x):,} samples to the exact mixture {w1:.4f} (exact samples have {w1_floor:.4f})",
            f"KS of the same samples {ks:.4f} (exact samples have {ks_floor:.4f})",
            *(self._report_classes(model, folder) if self.num_classes else ()),
        ]

    def _report_classes(self, model: DiffusionModel, folder: Path) -> list[str]:
        """Does the same for the model that is told classes; the lines above are of no class."""
        from diffusion.gaussian1d import figures

        lines = []
        for k, component in enumerate(self.components):
            predict = of_class(model.predict_for, k)
            excess = float(distances.excess_loss(predict, component, self.abar).mean())
            x = self._draw(predict, 8192)
            w1, floor = distances.wasserstein1(x, component), distances.wasserstein1_floor(component, len(x))
            lines.append(
                f"class {k}: excess loss {excess:.5f}; W1 of {len(x):,} samples to its component {w1:.4f} (exact "
                f"samples have {floor:.4f})"
            )
        scales = (0.0, 1.0, 2.0, 4.0)
        drawn = [
            [self._draw(of_class(model.predict_for, k, self.num_classes, s), 4096) for s in scales]
            for k in range(len(lines))
        ]
        figures.guidance(self.components, drawn, scales, folder / "guidance.png")
        return lines

    def sketch(self, model: DiffusionModel, folder: Path) -> None:
        self.draw_samples(self._draw(model.predict_for, 10_000).numpy(), folder / "density.png")

    @property
    def components(self) -> list[Mixture]:
        """The distribution of each class."""
        return [self.mixture.of_classes(one) for one in torch.eye(len(self.mixture.means))]

    def loss_floor(self) -> float:
        floor = float(self.mixture.loss_floor(self.abar).mean())
        if not self.num_classes:
            return floor
        known = [float(component.loss_floor(self.abar).mean()) for component in self.components]
        told = float(self.mixture.weights @ torch.tensor(known, dtype=torch.float64))
        return self.class_dropout * floor + (1 - self.class_dropout) * told

    def _draw(self, predict: Predict, n: int) -> Tensor:
        """Draws n samples, [n], with 50 steps of DPM-Solver++, whose own error is far below the Monte-Carlo floor."""
        steps, parts = min(50, len(self.abar)), []
        for start in range(0, n, 4096):
            xt = torch.from_numpy(normal(0, Stream.FIGURE, 0, start, min(start + 4096, n), (1,)))
            with torch.inference_mode():
                # dpm_solver never asks for noise: torch.randn is there because all samplers have one signature.
                *_, x0 = dpm_solver(Denoiser(predict, self.abar), xt, steps=steps, noise=torch.randn)
            parts.append(x0[:, 0])
        return torch.cat(parts)
