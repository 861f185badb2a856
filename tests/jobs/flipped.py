"""launch.py, but in one step of its training one bit of the gradient flips, as in a GPU that is about to fail.

A checkpoint waits for the one before, so that a slow disk does not put it off.
"""

import os
import sys
from unittest import mock

import torch
from torch import Tensor

import launch
from jobs.storage.checkpoints import Writer
from jobs.train.shards import VOTES
from jobs.train.state import Training

moved, steps = Training._move, 0


def flipping(self: Training) -> tuple[Tensor]:
    global steps
    steps += 1
    if steps == int(os.environ["FLIPPED_AT"]):
        gradient = self._gradient[:-VOTES]
        gradient.view(torch.int32)[gradient.abs().argmax()] ^= 1 << 16
    return moved(self)


if __name__ == "__main__":
    in_time = mock.patch.object(Writer, "is_busy", return_value=False)
    with in_time, mock.patch.object(Training, "_move", flipping):
        sys.exit(launch.main())
