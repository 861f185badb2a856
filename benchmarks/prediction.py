"""How training `mnist` scales to 8 and 64 GPUs: `python -m benchmarks.prediction` measures, counts, and predicts.

A step of p processes with b images each takes

    step(p) = compute + exposed
    compute = b F / R
    exposed = max(0, 2 (p - 1) / p G / W + 2 (p - 1) L - compute / 2)

where F is the arithmetic of an image, forward and backward (counted), R the rate of it on this machine's device
(measured at b, unless --tflops assumes one), G the bytes of the gradients that a ring all-reduce sums (counted), W the
bandwidth and L the latency of a hop of that ring (assumed). DDP sends gradients during most of the backward pass, which
is two thirds of the compute: half of the compute is taken to hide them. Clipping, AdamW and the moving average, which
take the same time however many processes there are, are left out. F counts all that is computed, also what attention
computes for pairs of heads and throws away.
"""

import argparse
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.training import Training


@dataclass(frozen=True)
class Network:
    """Between processes: bytes/s and seconds of a hop."""

    name: str
    bandwidth: float
    latency: float


NODE = Network("inside a node: 200 GB/s, 5 us", 200e9, 5e-6)
CLUSTER = Network("between nodes: 20 GB/s, 10 us", 20e9, 10e-6)
CASES = ((8, 128, NODE), (64, 128, CLUSTER), (8, 16, NODE), (64, 2, CLUSTER))
"""Processes, images of each in a step, and what connects them."""


def exposed(processes: int, compute: float, gradient_bytes: float, network: Network) -> float:
    """Seconds of a ring all-reduce that the backward pass does not hide."""
    hops = 2 * (processes - 1)
    return max(0.0, hops / processes * gradient_bytes / network.bandwidth + hops * network.latency - compute / 2)


def flops_of_an_image(training: "Training") -> float:
    """Of a forward and a backward pass, as torch counts them: products of matrices, and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    examples = [each[:2] for each in training.examples(1)]
    with FlopCounterMode(display=False) as counter:
        _pass(training, examples)
    return counter.get_total_flops() / 2


def seconds_of(training: "Training", images: int, passes: int = 5) -> float:
    """The median time of a forward and a backward pass, after one that warms up."""
    import torch

    examples, times = [each[:images] for each in training.examples(1)], []
    for _ in range(passes + 1):
        started = time.perf_counter()
        _pass(training, examples)
        if training.world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[passes // 2]


def _pass(training: "Training", examples: "list[Tensor]") -> None:
    training.world.accelerator.backward(training.model(*examples).mean())
    training.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, help="the rate R of a device that is not at hand, in TFLOP/s")
    options = parser.parse_args()

    from jobs.experiments import EXPERIMENTS
    from jobs.memory import keep_freed_memory
    from jobs.numerics import resolve_device, resolve_precision
    from jobs.training import Training
    from jobs.world import start

    keep_freed_memory()
    preset = EXPERIMENTS["mnist"].preset
    preset.prepare(print)
    kind = resolve_device("auto", None)
    precision = resolve_precision(preset.train.precision, kind)
    training = Training(preset.build(), preset.train, start(1, kind, precision))
    flops = flops_of_an_image(training)
    gradients = 4 * sum(weights.numel() for weights in training.raw.network.parameters())
    print(f"F = {flops / 1e9:.3g} GFLOP, G = {gradients / 1e6:.3g} MB")

    @cache
    def compute_of(images: int) -> float:
        return images * flops / (options.tflops * 1e12) if options.tflops else seconds_of(training, images)

    where = f"assumed, R = {options.tflops:g} TFLOP/s" if options.tflops else f"measured here, {kind} in {precision}"
    print(f"\n| processes x images | compute ({where}) | exposed | step | images/s | efficiency |")
    print("|---|---|---|---|---|---|")
    for processes, images, network in CASES:
        compute = compute_of(images)
        waiting = exposed(processes, compute, gradients, network)
        step = compute + waiting
        print(
            f"| {processes} x {images}, {network.name} | {1e3 * compute:.3g} ms | {1e3 * waiting:.3g} ms "
            f"| {1e3 * step:.3g} ms | {processes * images / step:,.0f} | {compute / step:.2f} |"
        )


if __name__ == "__main__":
    main()
