"""What tracking costs a training: `python -m benchmarks.tracking [--steps 400]` trains mnist-small with and without it.

Measures the seconds that the training process spends inside tracker calls (starting the follower, waiting for it at
the end) and in making a line of metrics.jsonl, and the rate of the steps between, where the follower only competes for
the processor: so it measures, too, the processor's time that the training and the processes of tracking have used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]

from jobs.storage.provenance import ROOT


def timed(call: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """The same call, its duration added to `seconds[name]`."""

    def wrapper(*arguments: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **more)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return wrapper


def cpu_s(pid: int) -> float:
    """Seconds of the processor that a process has used, and all that it has started."""
    root = psutil.Process(pid)
    # User and system, of the process and of children that have ended; what follows is waiting for disks.
    return float(sum(sum(process.cpu_times()[:4]) for process in (root, *root.children(recursive=True))))


def train(mode: str, steps: int) -> dict[str, float]:
    """Trains in this process and returns the seconds spent where."""
    import jobs.train.loop
    import jobs.train.recorder
    import launch
    from jobs.followers.start import FollowerProcess

    seconds: dict[str, float] = {}
    jobs.train.recorder.follow_training = timed(jobs.train.recorder.follow_training, seconds, "start")  # type: ignore[attr-defined]
    close = timed(FollowerProcess.close, seconds, "end")

    def measured_close(self: FollowerProcess, wait: bool) -> None:
        assert self._process is not None
        # Before it is told to end, because then there is nothing to look at.
        seconds["follower_cpu"] = cpu_s(self._process.pid)
        close(self, wait)

    FollowerProcess.close = measured_close  # type: ignore[method-assign]
    run_steps = jobs.train.loop.run_steps

    def measured_steps(*arguments: Any) -> Any:
        started = time.process_time()
        try:
            return run_steps(*arguments)
        finally:
            seconds["cpu"] = time.process_time() - started

    jobs.train.loop.run_steps = measured_steps  # type: ignore[assignment]
    jobs.train.loop.logged = timed(jobs.train.loop.logged, seconds, "lines")
    jobs.train.loop.run_steps = timed(jobs.train.loop.run_steps, seconds, "steps")
    jobs.train.loop.train = timed(jobs.train.loop.train, seconds, "total")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [str(ROOT / "launch.py"), "train", "mnist-small", "--cluster", "local", "--runs-dir", folder]
        sys.argv += ["--train.steps", str(steps), "--train.log-every", "10", "--tracking.mode", mode]
        code = launch.main()
    assert code == 0
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind, in turn; the medians are shown")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(train(options.mode, options.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {"disabled": [], "offline": []}
    for _ in range(options.rounds):
        for mode, results in found.items():
            # Each in a process of its own, because `train` wraps functions of the program, and would wrap them again.
            command = [sys.executable, "-m", "benchmarks.tracking", "--mode", mode, "--steps", str(options.steps)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            # What the training itself prints comes before.
            results.append(json.loads(printed.splitlines()[-1]))
    print(f"mnist-small, {options.steps} steps, a line every 10; medians of {options.rounds} rounds")
    for mode, results in found.items():
        median = {name: sorted(result[name] for result in results)[len(results) // 2] for name in results[0]}
        calls = median["start"] + median["end"]
        print(
            f"{mode:>9}: total {median['total']:6.1f} s, {1000 * median['steps'] / options.steps:6.1f} ms/step; "
            f"tracker calls: start {median['start']:.3f} s, end {median['end']:.3f} s, "
            f"together {calls / median['total']:.2%}; making lines {median['lines'] / median['total']:.2%}; "
            f"processor: {1000 * median['cpu'] / options.steps:.1f} ms/step, "
            f"tracking's processes {median['follower_cpu']:.1f} s"
        )


if __name__ == "__main__":
    main()
