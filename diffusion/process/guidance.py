"""Predictions that are led away from worse ones: those without a class, or those of weaker weights.

Classifier-free guidance (Ho & Salimans 2022) asks one network that predicts with a class, and without; autoguidance
(Karras et al. 2024) two networks, of which one has been trained for a shorter time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.samplers import Predict

PredictClass = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes xt [batch, ...], t [batch] and classes [batch], and returns eps; `num_classes` stands for no class."""


def guided(predict: PredictClass, classes: Tensor, num_classes: int, guidance: float) -> Predict:
    """Returns a prediction for examples of these classes [batch]: eps_none + S (eps_class - eps_none).

    `guidance` is S: 0 is without classes, 1 the class as it is, more exaggerates it. That is `cond_scale` in
    denoising-diffusion-pytorch (without its projection); the paper writes eps = (1 + w) eps_class - w eps_none
    (equation 6), so S = 1 + w.
    """
    without = torch.full_like(classes, num_classes)
    if guidance in (0, 1):  # one of the two is not needed
        return lambda xt, t: predict(xt, t, classes if guidance else without)
    both = torch.cat([classes, without])

    def eps(xt: Tensor, t: Tensor) -> Tensor:
        # One batch of double size keeps a device busier than two. Autocast may have made eps shorter.
        of_class, of_none = predict(torch.cat([xt, xt]), torch.cat([t, t]), both).to(xt.dtype).chunk(2)
        return of_none + guidance * (of_class - of_none)

    return eps


def autoguided(predict: Callable[..., Tensor], weak: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """Returns a prediction with the same arguments: eps_weak + S (eps - eps_weak).

    `scale` is S, w in Karras et al. 2024 ("Guiding a diffusion model with a bad version of itself", equation 3): 1 is
    `predict` alone. Where the two agree it changes nothing; where the weak one is worse, it goes further the same way.
    """

    def eps(xt: Tensor, t: Tensor, *classes: Tensor) -> Tensor:
        # Autocast may have made both shorter, and their difference is small.
        worse = weak(xt, t, *classes).to(xt.dtype)
        return worse + scale * (predict(xt, t, *classes).to(xt.dtype) - worse)

    return eps


def of_class(predict: PredictClass, k: int, num_classes: int = 0, guidance: float = 1.0) -> Predict:
    """Does the same where all examples are of class k, however many there are."""

    def eps(xt: Tensor, t: Tensor) -> Tensor:
        return guided(predict, torch.full((len(xt),), k, device=xt.device), num_classes, guidance)(xt, t)

    return eps
