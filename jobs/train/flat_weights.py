"""All parameters of a network in one tensor, so that norm, AdamW and average are one operation each, not hundreds."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Each parameter begins at a multiple of so many elements (64 bytes of fp32), which fast kernels want.

The length of the whole tensor is a multiple of it, too.
"""


class Flat:
    """Moves a network's parameters into one tensor, `weights` [n]; each keeps its shape and strides as a view of it.

    The gaps between parameters are zeros, and stay zero: their gradient is zero, and weight decay only scales them. A
    parameter that no backward pass reaches has gradient zero, and is updated like the others. Raises ValueError if the
    parameters differ in dtype, device or requires_grad.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = list(network.parameters())
        kinds = {(parameter.dtype, parameter.device, parameter.requires_grad) for parameter in self._parameters}
        if len(kinds) != 1:
            raise ValueError(f"a network's parameters must have one dtype, device and requires_grad; got {kinds}")
        self._starts, n = [], 0
        for parameter in self._parameters:
            self._starts.append(n)
            n += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT  # rounded up
        self.weights = nn.Parameter(self._parameters[0].new_zeros(n), requires_grad=False)
        for parameter, weights in zip(self._parameters, self.split(self.weights), strict=True):
            parameter.data = weights.copy_(parameter.detach())

    def place_gradients(self) -> Tensor:
        """Lets backward passes add all gradients into one tensor, `weights.grad`, and returns it."""
        self.weights.grad = torch.zeros_like(self.weights)
        for parameter, gradient in zip(self._parameters, self.split(self.weights.grad), strict=True):
            parameter.grad = gradient
        return self.weights.grad

    def split(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of a tensor like `weights`; the parts share its memory."""
        # as_strided, because `view` cannot give a parameter with channels last its strides.
        return [
            flat.as_strided(parameter.shape, parameter.stride(), start)
            for parameter, start in zip(self._parameters, self._starts, strict=True)
        ]

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Undoes `split`: copies parts into a tensor like `weights`; raises ValueError if a shape differs."""
        flat = torch.zeros_like(self.weights)
        for place, part in zip(self.split(flat), parts, strict=True):
            if place.shape != part.shape:
                raise ValueError(f"a part must have the shape {list(place.shape)}; got {list(part.shape)}")
            place.copy_(part)
        return flat


class FlatAdamW(torch.optim.AdamW):
    """AdamW of flat weights; its state_dict is that of an AdamW of the single parameters, so checkpoints do not differ.

    torch's fused optimizers read two tensors: gradients are divided by `grad_scale`, and if `found_inf` is 1 nothing
    moves, neither weights, moments nor the number of steps.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, flat: Flat, lr: float = 1e-3, **settings: Any) -> None:
        on_gpu = flat.weights.is_cuda
        # A CUDA graph repeats the numbers that it was captured with, so there the learning rate has to be a tensor.
        rate = torch.tensor(lr, device=flat.weights.device) if on_gpu else lr
        super().__init__([flat.weights], lr=rate, fused=True, capturable=on_gpu, **settings)
        self._flat = flat

    def set_lr(self, lr: float) -> None:
        group = self.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets gradients to zero in place, whatever is asked: they must stay views of the flat gradient."""
        super().zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        group = whole["param_groups"][0]
        n = len(self._flat.split(self._flat.weights))
        # `step` is one number here; an AdamW of single parameters has one for each of them.
        parts = {
            name: [value.clone() for _ in range(n)] if name == "step" else self._flat.split(value)
            for name, value in whole["state"].get(0, {}).items()
        }
        states = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        return {
            "state": dict(enumerate(states)),
            "param_groups": [{**group, "lr": float(group["lr"]), "capturable": False, "params": list(range(n))}],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = [state for _, state in sorted(state_dict["state"].items())]
        whole = {
            name: value.clone() if name == "step" else self._flat.join(state[name] for state in states)
            for name, value in (states[0].items() if states else ())
        }
        own = self.param_groups[0]
        # These two depend on the device, so that a GPU continues what a CPU has saved, and the other way round.
        group = {**state_dict["param_groups"][0], "lr": own["lr"], "capturable": own["capturable"], "params": [0]}
        super().load_state_dict({"state": {0: whole} if whole else {}, "param_groups": [group]})
