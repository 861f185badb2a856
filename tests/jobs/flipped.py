"""launch.py, but in one step of its training one bit of the gradient flips, as in a GPU that is about to fail.

A checkpoint waits for the one before, so that a slow disk does not put it off.
"""

import os
import sys
from collections.abc import Callable
from unittest import mock

import torch

import launch
from jobs.storage.checkpoints import Writer
from jobs.train.shards import ShardSum

summed, steps = ShardSum.__call__, 0


def flipping(self: ShardSum, add_gradient: Callable[[int], None]) -> None:
    global steps
    summed(self, add_gradient)
    steps += 1
    if steps == int(os.environ["FLIPPED_AT"]):
        self._gradient.view(torch.int32)[self._gradient.abs().argmax()] ^= 1 << 16


if __name__ == "__main__":
    in_time = mock.patch.object(Writer, "is_busy", return_value=False)
    with in_time, mock.patch.object(ShardSum, "__call__", flipping):
        sys.exit(launch.main())
