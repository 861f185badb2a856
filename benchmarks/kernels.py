"""How busy a GPU is in a step of training `mnist`, and with what: what torch's profiler has recorded of some steps."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.comparison import Alternative, Measurements, Row, limit

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind

SHOWN = 20


def rows(device: "Kind", small: bool) -> Iterator[Row]:
    """What a step asks the device to do, counted and recorded, and what takes most of its time."""
    yield from _step(device, small, compiled=False)
    if device == "cuda":
        yield from _step(device, small, compiled=True)


def _step(device: "Kind", small: bool, *, compiled: bool) -> Iterator[Row]:
    alternative = Alternative(recorded, device, small, compiled)
    try:
        found = alternative.measure()
    finally:
        alternative.close()
    suffix = ", compiled" if compiled else ""
    for what, unit in (
        ("operations of a step, which the host would have to launch one by one, counted", ""),
        ("kernels of a step, recorded", ""),
        ("a step, being recorded", "ms"),
        ("the kernels of a step", "ms"),
        ("share of a step in which the GPU is busy", ""),
        ("a step, not recorded", "ms"),
    ):
        if what in found:
            yield limit(what + suffix, unit, [found.pop(what)], None)
    for what, milliseconds in found.items():
        yield limit(what + suffix, "ms a step", [milliseconds], None)


def recorded(device: "Kind", small: bool, compiled: bool) -> Measurements:
    """The quantities of `rows`, and milliseconds by the name of a kernel, of an operator where there is no GPU."""
    import time

    from torch.profiler import ProfilerActivity, profile

    from benchmarks.device import wait
    from benchmarks.peers import experiment
    from benchmarks.prediction import launches_of
    from jobs.experiments.settings import TrainSettings
    from jobs.runtime.malloc import keep_freed_memory
    from jobs.runtime.numerics import resolve_precision
    from jobs.runtime.world import start
    from jobs.train.state import Training

    keep_freed_memory()
    settings = TrainSettings(steps=1_000_000, batch_size=16 if small else 128, lr=1e-4)
    world = start(1, device, resolve_precision("auto", device))
    training = Training(experiment(8 if small else 64), settings, world)
    # On a CPU a small step takes as many operations, and most of a second while another part is rehearsed beside it.
    steps = 2 if small and device == "cpu" else 10
    for _ in range(2 if small else 10):
        training.update()
    # Before the capture: a captured step is a single launch.
    launches = launches_of(training.update)
    if compiled:
        training.compile()
    if device == "cuda":
        training.capture()
        training.update()
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        training.update()
    wait(device)
    unrecorded = time.perf_counter() - started
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    wait(device)
    with profile(activities=activities) as recording:
        started = time.perf_counter()
        for _ in range(steps):
            training.update()
        wait(device)
        seconds = time.perf_counter() - started
    found = {"operations of a step, which the host would have to launch one by one, counted": float(launches)}
    found["a step, being recorded"] = 1e3 * seconds / steps
    found["a step, not recorded"] = 1e3 * unrecorded / steps
    times: Counter[str] = Counter()
    if device == "cuda":
        events = [e for e in recording.events() or [] if e.device_type.name == "CUDA"]
        for event in events:
            times[_short(event.name)] += event.device_time_total / 1e3 / steps
        found["kernels of a step, recorded"] = len(events) / steps
        found["the kernels of a step"] = sum(times.values())
        # There is one stream, so no two kernels run at once.
        found["share of a step in which the GPU is busy"] = sum(times.values()) * steps / 1e3 / seconds
    else:
        for average in recording.key_averages():
            times[average.key] += average.self_cpu_time_total / 1e3 / steps
    yield {**found, **{f"`{name}`": spent for name, spent in times.most_common(SHOWN)}}


def _short(kernel: str) -> str:
    """A kernel's name without what all of them say, and not too long; kernels of one such name count as one."""
    for said in ("void ", "at::native::", "(anonymous namespace)::", "c10::"):
        kernel = kernel.replace(said, "")
    return kernel[:110]
