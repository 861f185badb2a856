"""launch.py, but in one step of its training one bit of the gradient flips, as in a GPU that is about to fail."""

import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

import launch
from jobs.train.shards import ShardSum

summed, steps = ShardSum.__call__, 0


def flipping(self: ShardSum, add_gradient: Callable[[int], None]) -> None:
    global steps
    summed(self, add_gradient)
    steps += 1
    if steps == int(os.environ["FLIPPED_AT"]):
        self._gradient.view(torch.int32)[self._gradient.abs().argmax()] ^= 1 << 16


if __name__ == "__main__":
    with mock.patch.object(ShardSum, "__call__", flipping):
        sys.exit(launch.main())
