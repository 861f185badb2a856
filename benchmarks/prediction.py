"""How training `mnist` scales to 8 and 64 GPUs: `python -m benchmarks.prediction` measures, counts, and predicts.

A step of p processes with b images each takes

    step(p) = work + exchange
    work = max(compute, launches)
    compute = b F / R
    launches = N l
    exchange = 2 (p - 1) / p G / W + 2 (p - 1) L

where F is the arithmetic of an image, forward and backward (counted), R the rate of it (assumed by --tflops), N the
operations of a step, each of which the host has to launch (counted), l the time that it takes to launch one (assumed by
--launch-us), G the bytes of the gradients (counted), W the bandwidth and L the latency of a
hop (assumed). A GPU computes while the host launches what comes next, so the slower of both decides.
Without --tflops the passes are measured on this machine's device at b, launches and all.

Gradients are exchanged after the backward pass (jobs/train/shards.py), pieces of them to each process and back: what a
ring all-reduce sends. F counts all that is computed, also what attention computes for pairs of heads and throws away. N
counts an operation once that takes two or three kernels. A CPU counts it, in bf16, whose autocast converts less than
CUDA's: on a GPU it is a little more.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.train.state import Training


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
ASSUMED_LAUNCH_US = 8.0
"""Microseconds of a launch from Python, with autograd and autocast, on a good server's core."""


def exchange(processes: int, gradient_bytes: float, network: Network) -> float:
    """Seconds that summing gradients over processes takes."""
    hops = 2 * (processes - 1)
    return hops / processes * gradient_bytes / network.bandwidth + hops * network.latency


def work(compute: float, launches: int, launch_s: float) -> float:
    """Seconds of a step without communication: of the device's arithmetic, or of the host that launches it."""
    return max(compute, launches * launch_s)


def launches_of(call: Callable[[], object]) -> int:
    """The operations of a call that a GPU has to be told of: those that make new values or change old ones."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    launched = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal launched
            result = function(*args, **(kwargs or {}))
            # A view is another look at the same memory, and memory that is only reserved holds no values.
            before, after = (
                {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
                for tree in ((args, kwargs), result)
            )
            reserves = "empty" in function._schema.name
            launched += function._schema.is_mutable or bool(after - before and not reserves)
            return result

    with Counter():
        call()
    return launched


def flops_of_an_image(training: "Training") -> float:
    """Of a forward and a backward pass, as torch counts them: products of matrices, and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    examples = [each[:2] for each in training.examples(1)]
    with FlopCounterMode(display=False) as counter:
        _pass(training, examples)
    return counter.get_total_flops() / 2


def seconds_of(training: "Training", images: int) -> float:
    """The median time of five forward and backward passes, after one that warms up."""
    import torch

    examples, times = [each[:images] for each in training.examples(1)], []
    for _ in range(6):
        started = time.perf_counter()
        _pass(training, examples)
        if training.world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[2]


def _pass(training: "Training", examples: "list[Tensor]") -> None:
    training.world.accelerator.backward(training.model(*examples).mean())
    training.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, help="assume this rate R, in TFLOP/s, of a device that is not at hand")
    parser.add_argument(
        "--launch-us",
        type=float,
        default=ASSUMED_LAUNCH_US,
        help="assume this time of a launch, in microseconds, with --tflops (default: %(default)s)",
    )
    options = parser.parse_args()

    from jobs.experiments.table import EXPERIMENTS
    from jobs.runtime.malloc import keep_freed_memory
    from jobs.runtime.numerics import resolve_device, resolve_precision
    from jobs.runtime.world import start
    from jobs.train.state import Training

    keep_freed_memory()
    preset = EXPERIMENTS["mnist"].preset
    preset.data.prepare(print)
    kind = resolve_device("auto", None)
    # An assumed device is a GPU, where `mnist` trains in bf16; so its operations are counted as in bf16.
    precision = resolve_precision("bf16" if options.tflops else preset.train.precision, kind)
    training = Training(preset.build(), preset.train, start(1, kind, precision))
    training.update()  # the first one also makes the optimizer's state
    flops, launches = flops_of_an_image(training), launches_of(training.update)
    # 4 bytes each: gradients are those of fp32 weights, whatever the passes compute in.
    gradients = 4 * sum(weights.numel() for weights in training.raw.network.parameters())
    print(f"F = {flops / 1e9:.3g} GFLOP, G = {gradients / 1e6:.3g} MB, N = {launches:,}")

    @cache
    def work_of(images: int) -> float:
        if not options.tflops:
            return seconds_of(training, images)
        return work(images * flops / (options.tflops * 1e12), launches, options.launch_us / 1e6)

    assumed = f"assumed: R = {options.tflops:g} TFLOP/s, l = {options.launch_us:g} us" if options.tflops else ""
    print(f"\n| processes x images | work ({assumed or f'measured here, {kind} in {precision}'}) | ", end="")
    print("exchange | step | images/s | efficiency |\n|---|---|---|---|---|---|")
    for processes, images, network in CASES:
        seconds = work_of(images)
        waiting = exchange(processes, gradients, network)
        step = seconds + waiting
        # An ideal GPU would need no more than its arithmetic, or, where that is not known, wait for nobody.
        ideal = images * flops / (options.tflops * 1e12) if options.tflops else seconds
        print(
            f"| {processes} x {images}, {network.name} | {1e3 * seconds:.3g} ms | {1e3 * waiting:.3g} ms "
            f"| {1e3 * step:.3g} ms | {processes * images / step:,.0f} | {ideal / step:.2f} |"
        )


if __name__ == "__main__":
    main()
