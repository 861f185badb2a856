"""Jobs of processes that train `mnist` a few steps, on a GPU the network that its users train."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from diffusion.problems.mnist import MnistProblem
from diffusion.process.cuda_graphs import Captured
from diffusion.settings import UnetSettings
from jobs.experiments.table import EXPERIMENTS
from jobs.runtime.job import process_rank
from jobs.runtime.numerics import Kind, set_numerics
from jobs.runtime.world import World, _meet, start
from jobs.train import state
from jobs.train.shards import VOTES, ShardSum, room
from jobs.train.state import Training
from slurm import local
from tests.jobs.recorded import Recorded


def dim(device: Kind) -> int:
    """Channels of the network: on a GPU those of `mnist`, whose kernels are what is tested."""
    return 64 if device == "cuda" else 8


def training(device: Kind, mnist_root: Path, world: World) -> Training:
    """Of `mnist`, in batches that two processes can divide."""
    preset = EXPERIMENTS["mnist"].preset
    assert isinstance(preset.data, MnistProblem)
    asked = replace(
        preset,
        data=replace(preset.data, root=str(mnist_root)),
        model=UnetSettings(dim=dim(device)),
        train=replace(preset.train, batch_size=16, warmup_steps=2, steps=100),
    )
    return Training(asked.build(), asked.train, world)


@dataclass(frozen=True)
class GlooJob:
    """Six updates by processes that share one device: their losses, and a fingerprint of the weights.

    They may be `captured`; a CPU rehearses that.
    """

    folder: Path
    mnist_root: Path
    device: Kind
    processes: int
    captured: bool

    def __call__(self) -> int:
        # NCCL, which jobs/runtime/world.py takes for GPUs, wants one for each process; gloo sums what lies on the same.
        rank = process_rank()
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        if self.processes > 1:
            os.environ["LOCAL_RANK"] = "0"
            _meet(Path(os.environ["MASTER_PORT_FILE"]), "gloo")
        set_numerics("fp32")
        world = World(Accelerator(cpu=self.device == "cpu"), "fp32")
        assert (world.rank, world.size, world.device.type) == (rank, self.processes, self.device)
        trained = training(self.device, self.mnist_root, world)
        if self.device == "cpu":
            trained.optimizer._lr = torch.tensor(0.0)  # as on a GPU, because a graph would repeat a number
        if self.captured:
            with mock.patch.object(state, "Captured", Recorded if self.device == "cpu" else Captured):
                trained.capture()
        losses = [trained.sums(trained.update())[0] for _ in range(6)]
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in trained.raw.network.parameters())
        seen = {"losses": losses, "weights": hashlib.sha256(weights).hexdigest()}
        (self.folder / f"{rank}.json").write_text(json.dumps(seen))
        if self.processes > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0


@dataclass(frozen=True)
class ExchangeJob:
    """Exchanges gradients of whole numbers in a group of one process, between two graphs, as a step of several does.

    It captures when it has exchanged some already: by then the group has its stream and its watchdog.
    """

    folder: Path
    device: Kind

    def __call__(self) -> int:
        os.environ.update(local.environment(0, 1, str(self.folder / "port")))
        world = start(1, self.device, "fp32")
        assert dist.get_backend() == ("nccl" if self.device == "cuda" else "gloo")
        n = 1 << 22
        gradient = torch.zeros(n + room(n, processes=1), device=world.device)
        numbers = torch.arange(n, device=world.device).remainder(1000).float()
        shards = ShardSum(gradient, shards=4, rank=0, processes=1)

        def add_up(factor: Tensor) -> tuple[Tensor, ...]:
            return tuple(shards.add_up(lambda shard: gradient[:n].add_(numbers * factor * (shard + 1))))

        def move() -> tuple[Tensor]:
            moved = gradient.clone()
            gradient.zero_()
            return (moved,)

        launched = Recorded if self.device == "cpu" else Captured
        shards.exchange(add_up(numbers[1]), vote=0)
        before, after = launched(add_up, numbers[1]), launched(move)
        gradient.zero_()
        found = []
        for factor in (1, 2, 3):  # without a look at one before the next is launched
            before(numbers[factor])
            sums = [gradient.clone()]
            gradient.fill_(torch.nan)  # if nothing arrives, it stays
            shards.exchange(sums, vote=factor)
            found += after()
        for factor, moved in enumerate(found, 1):
            assert torch.equal(moved[:n], (1 + 2 + 3 + 4) * factor * numbers)
            assert moved[-VOTES:].tolist() == [float(vote == factor) for vote in range(VOTES)]
        assert shards.exchange_s > 0
        world.close()
        return 0


@dataclass(frozen=True)
class DeterministicJob:
    """Updates that fail where torch knows an operation to give other bytes each time."""

    mnist_root: Path
    device: Kind
    precision: str

    def __call__(self) -> int:
        torch.use_deterministic_algorithms(True)
        # It would fill each new tensor first, so that what reads too early reads the same; nothing here does.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        trained = training(self.device, self.mnist_root, start(1, self.device, self.precision))  # type: ignore[arg-type]
        for _ in range(3):
            trained.update()
        trained.snapshot()
        return 0
