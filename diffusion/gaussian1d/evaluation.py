"""The evaluation of the 1D experiment, which compares everything with the exact answer."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.gaussian1d import distances
from diffusion.gaussian1d.experiment import Gaussian1d
from diffusion.gaussian1d.mixture import Mixture
from diffusion.gaussian1d.sample_distances import metrics_of, sample_metrics
from diffusion.gaussian1d.sampler_errors import sampler_errors
from diffusion.process.guidance import of_class
from diffusion.process.model import DiffusionModel
from diffusion.process.samplers import Denoiser, Predict
from diffusion.settings import SAMPLERS, SamplerSettings
from diffusion.statistics.evaluator import Drawn, Evaluator, Metric, Result, Table, Unit, pack, unpack
from diffusion.statistics.flow import log_likelihood

STEPS = (10, 20, 50, 100)
"""The samplers are compared at these numbers of network evaluations."""
POINTS, PARTS = 1000, 4
"""The log-likelihood is averaged over so many quantiles of the data, in so many units of work."""


class Evaluator1d(Evaluator):
    """Samples x [n] of a mixture, and the model that drew them; without it what the samples alone tell."""

    def __init__(self, experiment: Gaussian1d, drawn: Drawn) -> None:
        """Samples that were to be of certain classes are compared with the mixture of so many of each."""
        self._experiment, self._mixture, self._abar = experiment, experiment.mixture, experiment.abar
        self._start = self._mixture.at(float(self._abar[0]))
        self._samples, self._seed, self._classes = torch.from_numpy(drawn.samples), drawn.seed, drawn.classes
        self._target = experiment.mixture_of(drawn.classes)
        self._model = drawn.model.cpu() if drawn.model is not None else None  # a GPU would not be faster
        compared = [
            SamplerSettings(sampler=name, steps=steps)
            for name in SAMPLERS
            for steps in STEPS
            if steps <= len(self._abar)
        ]
        # What is asked of the network as a whole is asked without a class, for any mixture of samples.
        self._without = ", without a class" if experiment.num_classes else ""
        self._own, order = drawn.sampler, list(SAMPLERS)
        self._samplers = sorted({self._own, *compared}, key=lambda s: (order.index(s.sampler), s.eta, s.steps))

    @property
    def num_judged(self) -> int:
        return len(self._samples)

    def units(self) -> dict[str, Unit]:
        units = {"samples": Unit("samples", self._of_samples)}
        if self._model is None:
            return units
        model = self._model
        for settings in sorted(self._samplers, key=lambda settings: -settings.steps):
            units[f"sampler-{settings.label}"] = Unit("weights", partial(self._of_sampler, model, settings))
        for part in range(PARTS):
            units[f"likelihood-{part}"] = Unit("weights", partial(self._likelihood, model, part))
        units["excess-loss"] = Unit("weights", partial(self._excess_loss, model))
        return units

    def metrics(self, results: Mapping[str, Result]) -> dict[str, Metric]:
        own = results["samples"]
        found = {
            name: Metric(metric.label, unpack(own[name]), unpack(own[f"{name}_floor"]), metric.better, metric.bounds)
            for name, metric in metrics_of(self._target).items()
        }
        for k in self._told():
            title = f"W1 of class {k} to its component"
            found[f"w1_class_{k}"] = Metric(title, unpack(own[f"w1_class_{k}"]), unpack(own[f"w1_class_{k}_floor"]))
        if self._model is None:
            return found
        for k in range(self._experiment.num_classes):
            mean = float(results["excess-loss"][f"excess_class_{k}"].mean())
            found[f"excess_loss_class_{k}"] = Metric(f"excess loss of class {k}", mean, 0.0)
        errors = results[f"sampler-{self._own.label}"]
        excess = results["excess-loss"]["excess"]
        gap = float(np.concatenate([results[f"likelihood-{part}"]["gap"] for part in range(PARTS)]).mean())
        # E log p_model = E log p_data - KL(data || model), and E log p_data is minus the entropy.
        entropy = self._start.entropy()
        return {
            **found,
            "network_error": Metric(f"W1 by the network alone{self._without}", float(errors["network_alone"]), 0.0),
            "sampler_error": Metric("W1 by the sampler alone", float(errors["sampler_alone"]), float(errors["floor"])),
            "excess_loss": Metric(f"excess loss over the optimum{self._without}", float(excess.mean()), 0.0),
            "log_likelihood": Metric(f"log-likelihood (nats){self._without}", -entropy - gap, -entropy, "higher"),
            "likelihood_gap": Metric(f"KL(data || model) (nats){self._without}", gap, 0.0),
        }

    def glance(self) -> dict[str, Metric]:
        found = self.metrics({"samples": self._of_samples()})
        return {name: found[name] for name in ("w1", "ks")}

    def tables(self, results: Mapping[str, Result]) -> dict[str, Table]:
        if self._model is None:
            return {}
        title = f"W1 to the exact answer, by sampler and network evaluations{self._without}"
        rows: list[dict[str, str | float]] = [
            {
                "sampler": s.sampler,
                "steps": s.steps,
                "eta": s.eta,
                **{name: value.item() for name, value in results[f"sampler-{s.label}"].items()},
            }
            for s in self._samplers
        ]
        return {"samplers": Table(title, rows)}

    def curves(self, results: Mapping[str, Result]) -> dict[str, Any]:
        return {} if self._model is None else {"excess_loss_by_t": results["excess-loss"]["excess"].tolist()}

    def draw(self, results: Mapping[str, Result], folder: Path) -> None:
        if self._model is None:
            return
        from diffusion.figures import quality
        from diffusion.gaussian1d import figures  # here, because plotting libraries take a second to import

        floor = self._mixture.loss_floor(self._abar)
        figures.excess_loss(torch.from_numpy(results["excess-loss"]["excess"]), floor, folder / "excess-loss.png")
        quality.sampler_errors(self.tables(results)["samplers"].rows, folder / "samplers.png")

    def _of_samples(self) -> Result:
        # Only classes that occur, as in `mixture_of`, which leaves out components without samples.
        numbers = None if self._classes is None else np.unique(self._classes, return_counts=True)[1].tolist()
        found = sample_metrics(self._samples, self._target, self._seed, numbers)
        for k in self._told():
            of_class = self._samples[torch.from_numpy(self._classes == k)]
            found[f"w1_class_{k}"] = sample_metrics(of_class, self._experiment.components[k], self._seed)["w1"]
        return {
            **{name: pack(estimate) for name, (estimate, _) in found.items()},
            **{f"{name}_floor": pack(floor) for name, (_, floor) in found.items()},
        }

    def _of_sampler(self, model: DiffusionModel, settings: SamplerSettings) -> Result:
        denoiser, exact = (Denoiser(p, self._abar) for p in (model.predict, self._experiment.exact_predict))
        errors = sampler_errors(denoiser, exact, self._mixture, settings)
        return {name: np.array(value) for name, value in vars(errors).items()}

    def _excess_loss(self, model: DiffusionModel) -> Result:
        found: dict[str, tuple[Predict, Mixture]] = {"excess": (model.predict, self._mixture)}
        for k in range(self._experiment.num_classes):  # all of them, for other sets of the same weights
            found[f"excess_class_{k}"] = of_class(model.predict, k), self._experiment.components[k]
        return {name: distances.excess_loss(*pair, self._abar).numpy() for name, pair in found.items()}

    def _told(self) -> list[int]:
        """The classes that samples were to be of."""
        return [] if self._classes is None else np.unique(self._classes).tolist()

    def _likelihood(self, model: DiffusionModel, part: int) -> Result:
        """log p_data - log p_model at every PARTS-th of the data's quantiles; the mean over all is KL(data || model).

        Uses quantiles of the data instead of random held-out points, so the result has no sampling noise. They are
        quantiles at t = 0, the smallest noise level, where the model's density is defined.
        """
        u = (torch.arange(POINTS, dtype=torch.float64)[part::PARTS] + 0.5) / POINTS
        x = self._start.quantile(u)
        # A copy, because `double` changes a model itself, and other units go on with it in float32.
        modelled = log_likelihood(copy.deepcopy(model).double().predict, x[:, None], self._abar)
        return {"gap": (self._start.pdf(x).log() - modelled).numpy()}
