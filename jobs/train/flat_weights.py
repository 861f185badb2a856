"""All parameters of a network in one tensor, so that norm, AdamW and average are one operation each, not hundreds."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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

    def place_gradients(self, more: int = 0) -> Tensor:
        """Lets backward passes add all gradients into one tensor [n + more], and returns it; it begins as zeros.

        The last numbers of it are nobody's gradient.
        """
        whole = self.weights.new_zeros(len(self.weights) + more)
        self.weights.grad = whole[: len(self.weights)]
        for parameter, gradient in zip(self._parameters, self.split(whole), strict=True):
            parameter.grad = gradient
        return whole

    def split(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of a tensor like `weights`; the parts share its memory."""
        # as_strided, because `view` cannot give a parameter with channels last its strides.
        return [
            flat.as_strided(parameter.shape, parameter.stride(), start)
            for parameter, start in zip(self._parameters, self._starts, strict=True)
        ]

    def state_dict(self, network: nn.Module) -> dict[str, Tensor]:
        """Returns a copy of the network's state, in a CPU's memory: its parameters are parts of one tensor there."""
        copied = self.weights.detach().to("cpu", copy=True)
        parts = dict(zip(map(id, self._parameters), self.split(copied), strict=True))
        found = network.state_dict(keep_vars=True)
        return {name: parts[id(v)] if id(v) in parts else v.detach().to("cpu", copy=True) for name, v in found.items()}

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Undoes `split`: copies parts into a tensor like `weights`; raises ValueError if a shape differs."""
        flat = torch.zeros_like(self.weights)
        for place, part in zip(self.split(flat), parts, strict=True):
            if place.shape != part.shape:
                raise ValueError(f"a part must have the shape {list(place.shape)}; got {list(part.shape)}")
            place.copy_(part)
        return flat


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) of flat weights; its state_dict is that of torch's AdamW of single parameters.

    It calls torch's function for it. The class torch.optim.AdamW would load torch's compiler with its first step, which
    takes a second of each start.

    Gradients are divided by `grad_scale`, and if `found_inf` is 1 nothing moves, neither weights, moments nor the
    number of steps.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, flat: Flat, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 1e-2
    ) -> None:
        weights = flat.weights
        self._flat = flat
        self._settings: dict[str, Any] = {"betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
        # A CUDA graph repeats the numbers that it was captured with, so there the learning rate has to be a tensor.
        self._lr: float | Tensor = torch.tensor(lr, device=weights.device) if weights.is_cuda else lr
        self._state = {
            # The fused kernel reads it on the device, and does not count a step that it leaves out.
            "step": torch.zeros((), device=weights.device),
            "exp_avg": torch.zeros_like(weights),
            "exp_avg_sq": torch.zeros_like(weights),
        }

    def set_lr(self, lr: float) -> None:
        if isinstance(self._lr, Tensor):
            self._lr.fill_(lr)
        else:
            self._lr = lr

    @torch.no_grad()
    def step(self) -> None:
        """Moves the weights by their gradient."""
        weights, state = self._flat.weights, self._state
        assert weights.grad is not None
        beta1, beta2 = self._settings["betas"]
        adamw(
            params=[weights],
            grads=[weights.grad],
            exp_avgs=[state["exp_avg"]],
            exp_avg_sqs=[state["exp_avg_sq"]],
            max_exp_avg_sqs=[],
            state_steps=[state["step"]],
            lr=self._lr,
            beta1=beta1,
            beta2=beta2,
            eps=self._settings["eps"],
            weight_decay=self._settings["weight_decay"],
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            fused=True,
            capturable=weights.is_cuda,
            amsgrad=False,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Sets gradients to zero in place, because they must stay views of the flat gradient."""
        assert self._flat.weights.grad is not None
        self._flat.weights.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state, in a CPU's memory."""
        n = len(self._flat.split(self._flat.weights))
        # A GPU copies few large tensors sooner than hundreds of small ones.
        copies = {name: value.to("cpu", copy=True) for name, value in self._state.items()}
        # `step` is one number here; an AdamW of single parameters has one for each of them.
        parts = {
            name: [value.clone() for _ in range(n)] if name == "step" else self._flat.split(value)
            for name, value in copies.items()
        }
        states = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        group = {
            # In torch's order, which decides over the bytes of a checkpoint.
            "lr": float(self._lr),
            **self._settings,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
            "params": list(range(n)),
        }
        return {"state": dict(enumerate(states)), "param_groups": [group]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes all but the learning rate; a GPU continues what a CPU has saved, and the other way round."""
        group = state_dict["param_groups"][0]
        self._settings = {name: group[name] for name in self._settings}
        states = [state for _, state in sorted(state_dict["state"].items())]
        for name, value in self._state.items():
            value.copy_(states[0][name] if name == "step" else self._flat.join(state[name] for state in states))
