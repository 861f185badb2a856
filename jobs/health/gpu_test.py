"""Whether a device computes what it should: a product whose every number is known, again and again for a second.

Meanwhile the driver of a GPU is asked for its errors (jobs/health/gpu_errors.py).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from jobs.health.gpu_errors import Question
from jobs.runtime.job import MachineError
from jobs.runtime.numerics import uuid_of, whereabouts

SIZE = 2048
SECONDS = 1.0


def check(device: torch.device, seconds: float = SECONDS) -> None:
    """Raises MachineError on a GPU that is broken; a CPU is not tested."""
    if device.type == "cuda" and (fault := fault_of(device, seconds)):
        raise MachineError(f"{whereabouts()} must not be used: {fault}")


def fault_of(
    device: torch.device,
    seconds: float = SECONDS,
    size: int = SIZE,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> str | None:
    """Says what is wrong with the device, None if nothing is found.

    Entry (i, j) of the product of rows a_i = i mod 7 and columns b_j = j mod 5 is size * a_i * b_j: small integers,
    which fp32 and TF32 give exactly, in whatever order they add.
    """
    uuid = uuid_of(device)
    errors = None if uuid is None else Question(f"GPU-{uuid}")
    rows = (torch.arange(size, device=device) % 7).float()
    columns = (torch.arange(size, device=device) % 5).float()
    left, right = rows[:, None].expand(size, size).contiguous(), columns[None].expand(size, size).contiguous()
    expected = size * rows[:, None] * columns
    deadline = time.monotonic() + seconds
    while True:
        wrong = int((product(left, right) != expected).sum())
        if wrong:
            return f"{device} computes wrongly: {wrong} of {size * size} numbers of a product are not what they must be"
        if time.monotonic() >= deadline:
            return errors.answer() if errors is not None else None
