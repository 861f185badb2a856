"""Jobs for tests of several processes: each writes what it saw into a file of its own.

`python -m tests.jobs.parallel JOB PROCESSES` runs one, and prints how it has ended.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian1d.experiment import Gaussian1d
from jobs.audit.compute import AuditRecorder, WritingRecorder
from jobs.audit.plan import Part, Stretch
from jobs.doctor.trial_job import DoctorJob
from jobs.experiments.configs import ExperimentConfig
from jobs.experiments.table import EXPERIMENTS
from jobs.health.watchdog import Watchdog
from jobs.runtime import world
from jobs.runtime.job import process_rank
from jobs.runtime.signals import SignalWatch, Stop
from jobs.runtime.world import start
from jobs.storage import checkpoints
from jobs.storage.run_folder import RunFolder
from jobs.terminal.console import Console
from jobs.train import state
from jobs.train.state import Training
from slurm import local
from tests.jobs.recorded import Recorded
from tests.launching import ROOT, finish, wait_until
from tests.launching import start as start_command


def run(job: Callable[[], int], processes: int) -> tuple[local.Outcome, str]:
    """`slurm.local.run`, in a process that has loaded torch; returns the outcome and what the job has printed."""
    own = start_command(pickle.dumps(job).hex(), processes, cwd=ROOT, module="tests.jobs.parallel")
    ended = finish(own)
    return local.Outcome(**json.loads(ended.out)), ended.err


class PoisonedAtStepThree(Gaussian1d):
    """The last example of step 3 is NaN: it lies in the last process's share."""

    def batch(self, seed: int, step: int, first: int, stop: int, batch_size: int, device: torch.device) -> Tensor:
        x0 = super().batch(seed, step, first, stop, batch_size, device)
        if step == 3 and stop == batch_size:
            x0[-1] = torch.nan
        return x0


def config(batch_size: int, grad_shards: int | None = None) -> ExperimentConfig:
    preset = EXPERIMENTS["1d"].preset
    return replace(preset, train=replace(preset.train, batch_size=batch_size, grad_shards=grad_shards, steps=10))


@dataclass(frozen=True)
class SkipJob:
    """Five updates, the third poisoned: for each whether it was skipped and a fingerprint of the weights after it.

    The last process asks to stop after the fourth: what they agree on is in there, too. The steps may be `captured`.
    """

    folder: Path
    processes: int
    grad_shards: int | None
    captured: bool = False

    def __call__(self) -> int:
        settings = config(64, self.grad_shards)
        world = start(self.processes, "cpu", "fp32")
        experiment = PoisonedAtStepThree(settings.data, settings.model, settings.diffusion)
        training = Training(experiment, settings.train, world)
        training.optimizer._lr = torch.tensor(0.0)  # as on a GPU, because a graph would repeat a number
        if self.captured:
            with mock.patch.object(state, "Captured", Recorded):
                training.capture()
        seen = []
        for step in range(1, 6):
            asks = step == 4 and world.rank == world.size - 1
            update = training.update(lambda asks=asks: Stop.REQUEUE if asks else Stop.NO)  # type: ignore[misc]
            weights = [float(p.double().sum()) for p in training.raw.network.parameters()]
            averages = [float(p.double().sum()) for p in training.ema.network.parameters()]
            done = {"loss": training.sums(update)[0], "stop": update.stop}
            seen.append({"skipped": update.skipped, "weights": weights, "averages": averages, **done})
        (self.folder / f"{world.rank}.json").write_text(json.dumps(seen))
        world.close()
        return 0


@dataclass(frozen=True)
class ExamplesJob:
    """Data, timesteps and noise of three steps, as this process draws them."""

    folder: Path
    processes: int

    def __call__(self) -> int:
        settings = config(520)  # no multiple of the blocks in which numbers are drawn
        world = start(self.processes, "cpu", "fp32")
        training = Training(settings.build(), settings.train, world)  # type: ignore[arg-type]
        abar = training.raw.alphas_cumprod
        assert abar.to(world.device) is abar, "what is there already must not be copied"
        parts = [torch.cat([x.flatten().double() for x in training.examples(step)]) for step in (1, 2, 500)]
        # [3 steps, 3 quantities, share]
        np.save(self.folder / f"{world.rank}.npy", torch.stack(parts).reshape(3, 3, -1).numpy())
        world.close()
        return 0


@dataclass(frozen=True)
class LateJob:
    """Two processes meet; the second one comes when the first one has written the port."""

    folder: Path

    def __call__(self) -> int:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401  # makes the backend known

        port_file = Path(os.environ["MASTER_PORT_FILE"])
        if os.environ["RANK"] == "1":
            wait_until(port_file.exists)
            time.sleep(1)  # the first one now has all that it needs to go on
        world._meet(port_file, "fake")
        (self.folder / os.environ["RANK"]).touch()
        wait_until(lambda: all((self.folder / rank).exists() for rank in "01"))  # the first one keeps the store
        return 0


@dataclass(frozen=True)
class CloseJob:
    """The first process still works when the others have ended, for longer than a collective may take."""

    folder: Path

    def __call__(self) -> int:
        world = start(2, "cpu", "fp32")
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
        if world.rank == 0:
            wait_until((self.folder / "comes").exists)
            time.sleep(3)
            assert not (self.folder / "leaves").exists()
            world.close()
        else:
            (self.folder / "comes").touch()
            world.close()
            (self.folder / "leaves").touch()
        return 0


@dataclass(frozen=True)
class LastJob:
    """The second process asks the first one whether all have come, and then not again for two seconds."""

    folder: Path

    def __call__(self) -> int:
        group, asks_again = start(2, "cpu", "fp32"), self.folder / "asks-again"
        if group.rank == 0:
            wait_until((self.folder / "rests").exists)
            assert not asks_again.exists()
            group.close()
            assert asks_again.exists()
            return 0
        rest = time.sleep

        def long_rest(seconds: float) -> None:
            (self.folder / "rests").touch()
            rest(2)
            asks_again.touch()

        with mock.patch.object(time, "sleep", long_rest):
            group.close()
        return 0


@dataclass(frozen=True)
class PausedJob:
    """The second process comes to a collective later than it may come to the meeting, as after a pause of all."""

    folder: Path

    def __call__(self) -> int:
        with mock.patch.object(world, "MEETING", timedelta(seconds=5)):
            group = start(2, "cpu", "fp32")
        if group.rank == 1:
            wait_until((self.folder / "waits").exists)
            time.sleep(6)
        else:
            (self.folder / "waits").touch()
        assert group.sum(torch.ones(1)) == 2
        group.close()
        return 0


@dataclass(frozen=True)
class LoneJob:
    """One process that makes a group, as a task of Slurm's."""

    folder: Path

    def __call__(self) -> int:
        os.environ.update(local.environment(0, 1, str(self.folder / "port")))
        group = start(1, "cpu", "fp32")
        assert torch.distributed.is_initialized()
        group.close()
        return int(torch.distributed.is_initialized())


@dataclass(frozen=True)
class GarblingJob:
    """The doctor's job, where the first number that process 1 sends by this function arrives as another."""

    job: DoctorJob
    function: str

    def __call__(self) -> int:
        where, _, name = self.function.rpartition(".")
        right = getattr(import_module(where), name)

        def garbling(received: Tensor, sent: Tensor) -> None:
            garbled = sent.clone()
            garbled[0] += 1
            right(received, garbled)

        with mock.patch(self.function, garbling if process_rank() == 1 else right):
            return self.job()


@dataclass(frozen=True)
class FailJob:
    """Process 1 fails, the others would wait for ever."""

    folder: Path

    def __call__(self) -> int:
        (self.folder / os.environ["RANK"]).write_text(str(os.getpid()))
        if os.environ["RANK"] == "1":
            raise AssertionError("broken on purpose")
        import threading

        threading.Event().wait()
        return 0


@dataclass(frozen=True)
class AuditSaveJob:
    """A step of an audit with a slow save after it: each process writes whether it is done when it may go on."""

    folder: Path
    processes: int

    def __call__(self) -> int:
        settings = config(64)
        run = RunFolder(self.folder)
        part = Part(1, settings, {}, is_known=True)
        stretch = Stretch(0, 1, {1: {}}, (part,), run.path)
        watchdog = Watchdog(self.folder / "hang")
        training = Training(settings.build(), settings.train, start(self.processes, "cpu", "fp32"))  # type: ignore[arg-type]
        recorder = AuditRecorder(stretch, part, training, watchdog)
        if training.world.rank == 0:
            recorder = WritingRecorder(stretch, part, training, watchdog, SignalWatch(), Console(None))
            run.checkpoints.mkdir()
        training.update()
        if training.world.rank == 0:
            time.sleep(0.5)
        recorder.after_step(None)
        seen = [checkpoints.steps(run.checkpoints), watchdog.doing]
        (self.folder / f"{training.world.rank}.json").write_text(json.dumps(seen))
        training.world.close()
        return 0


if __name__ == "__main__":
    print(json.dumps(asdict(local.run(pickle.loads(bytes.fromhex(sys.argv[1])), int(sys.argv[2])))))
