"""The device that is measured: which one, in which precision, when it has finished, and how much memory it took."""

import os

import torch

from jobs.runtime.numerics import Kind


def hide_gpus(device: Kind) -> None:
    """Keeps a process that measures a CPU there: libraries take a GPU where they find one. Before CUDA is used."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def wait(device: Kind) -> None:
    """Returns when the device has done all that it was told to; before that no clock means anything."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory_mb(device: Kind) -> dict[str, float]:
    """The most that this process's tensors took on a GPU since the last call; gives back what is free now.

    Several processes take turns on one GPU, and what one of them keeps in reserve the others lack.
    """
    if device == "cpu":
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"memory_mb": peak}
