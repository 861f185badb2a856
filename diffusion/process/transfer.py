"""Moves numbers from the host's memory to the device that computes."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """Returns numbers as a tensor on a device. A GPU copies them from pinned memory, so that its host need not wait."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
