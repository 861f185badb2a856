"""The processes of a job, and the few collectives that training needs."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from jobs.runtime.job import JobError, process_rank
from jobs.runtime.numerics import Kind, Precision, own_device, set_numerics, whereabouts

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that work together on one job, seen from one of them."""

    accelerator: Accelerator
    precision: Precision

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        device = self.accelerator.device
        # With several processes Accelerate calls it cpu:0, which no tensor's device equals: each `to` would copy.
        return torch.device("cpu") if device.type == "cpu" else device

    def share(self, batch_size: int) -> tuple[int, int]:
        """[start, stop) of this process's examples in a global batch."""
        return self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean of each of the values [n] over all processes; every process must call it."""
        values = values.detach().double()
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return list(values.tolist())

    def of_first(self, value: T) -> T:
        """The first process's value, on all of them; every process must call it."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def reduce_max(self, value: int) -> Callable[[], int]:
        """Starts a maximum over all processes; calling what it returns waits for the result."""
        if self.size == 1:
            return lambda: value
        tensor = torch.tensor([value], device=self.device)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)

        def result() -> int:
            work.wait()
            return int(tensor.item())

        return result

    def close(self) -> None:
        """Leaves the group, after all have come this far: one that goes early breaks the others' connections.

        All is saved by then, so what breaks here is no failure any more.
        """
        if self.size == 1:
            return
        with suppress(RuntimeError):
            # Told the device, NCCL need not guess it, and warn that it did.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
            dist.destroy_process_group()


def start(processes: int, device: Kind, precision: Precision) -> World:
    """Joins the job's processes, found through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, as Accelerate does.

    Raises JobError if this process finds no GPU for itself and should, and RuntimeError if the processes are not
    `processes` many: each that believes itself alone would train a run of its own and write over the others.
    """
    set_numerics(precision)
    own_device(device)
    # Accelerate would name DDP the GPU of LOCAL_RANK, which is not there where each task is shown its own GPU alone.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[
            # Without it DDP reorders its gradient buckets after the first backward pass, so that the first step after a
            # resume would sum in another order than the same step of an uninterrupted run.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=10)),
        ],
    )
    if accelerator.num_processes != processes:
        raise RuntimeError(
            f"this job has {processes} processes, but process {process_rank()} finds "
            f"{accelerator.num_processes}; are RANK, WORLD_SIZE and MASTER_ADDR set for each?"
        )
    if accelerator.device.type != device:
        raise JobError(f"{whereabouts()} should compute on {device} and was given {accelerator.device}")
    if device == "cuda" and processes > 1:
        _check_own_gpus(accelerator)
    return World(accelerator, precision)


def _check_own_gpus(accelerator: Accelerator) -> None:
    """Raises JobError, the same on each process, where two processes have one GPU: NCCL hangs or fails later on.

    Through the store by which the processes have met: a first collective would need what is checked here.
    """
    gpu = torch.cuda.get_device_properties(accelerator.device)
    store = dist.distributed_c10d._get_default_store()
    store.set(f"gpu-of-{accelerator.process_index}", f"{gpu.name}, {getattr(gpu, 'uuid', accelerator.process_index)}")
    gpus = [store.get(f"gpu-of-{rank}").decode() for rank in range(accelerator.num_processes)]
    for rank, name in enumerate(gpus):
        if " MIG " in name:
            raise JobError(f"process {rank} has a MIG slice ({name}): slices cannot train together; use --gpus 1")
        if name in gpus[:rank]:
            raise JobError(
                f"processes {gpus.index(name)} and {rank} have one and the same GPU ({name}); each needs one of its own"
            )
