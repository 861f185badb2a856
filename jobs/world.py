"""The processes of a job: devices, precision, and the few collectives that training needs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

Kind = Literal["cuda", "cpu"]
Precision = Literal["bf16", "fp32"]


def resolve_device(device: Literal["auto", "cuda", "cpu"], gpus: int | None) -> Kind:
    """The kind of device to run on; raises ValueError where GPUs were asked for that are not there."""
    found = torch.cuda.device_count()
    if device == "cuda" and found == 0:
        raise ValueError("--device cuda needs a CUDA GPU; torch finds none on this machine")
    if device == "cpu":
        return "cpu"
    if gpus is not None and gpus > found:
        raise ValueError(
            f"--gpus must not exceed the GPUs of this machine, of which torch finds {found}; got {gpus} "
            f"(--device cpu --gpus {gpus} rehearses with CPU processes)"
        )
    return "cuda" if found else "cpu"


def resolve_precision(precision: Literal["auto", "bf16", "fp32"], device: Kind) -> Precision:
    """bf16 for auto where the hardware really computes in it; Accelerate's own test says yes on every CPU."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


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
        """The mean of each value over all processes; every process must call it."""
        values = values.detach().double()
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values.tolist()

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
        """Leaves the group, after all have come this far: one that goes early breaks the others' connections."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def start(processes: int, device: Kind, precision: Precision) -> World:
    """Joins the job's processes, found through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, as Accelerate does.

    Raises RuntimeError if they are not `processes` many: each process that believes itself alone would train a run of
    its own and write over the others.
    """
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
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
            f"this job has {processes} processes, but process {os.environ.get('RANK', '0')} finds "
            f"{accelerator.num_processes}; are RANK, WORLD_SIZE and MASTER_ADDR set for each?"
        )
    return World(accelerator, precision)
