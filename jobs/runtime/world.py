"""The processes of a job, and the few collectives that training needs."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import check_cuda_p2p_ib_support
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but missing in its __all__

from jobs.runtime.job import JobError, MachineError, process_rank
from jobs.runtime.numerics import Kind, Precision, own_device, set_numerics, uuid_of, whereabouts

T = TypeVar("T")

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.14 on

MEETING = timedelta(minutes=20)
"""Processes wait this long for each other when they meet."""
COLLECTIVE = timedelta(days=1)
"""A collective waits this long for the slowest process.

The watchdog ends those that hang far earlier (jobs/health), and knows a hang from a job that was stopped as a whole.
This clock goes on in such a job, and a collective that ends in vain takes all processes along.
"""
LEAVING_S = 10.0
"""The first process waits so long for the others to leave: one may have died after all was saved."""


@dataclass(frozen=True)
class World:
    """The processes that work together on one job, as one of them sees them."""

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

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums values of any shape over all processes, in float64; every process must call it."""
        values = values.detach().to(torch.float64, copy=True)  # a copy, because the sum takes its place
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def of_first(self, value: T) -> T:
        """Returns the first process's value on all of them; every process must call it."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def of_all(self, value: T) -> list[T]:
        """Returns the values of all processes, in their order; every process must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self, waits_for_nobody: Callable[[], bool] = lambda: False) -> None:
        """Leaves the group after all processes have come this far; one that left early would break their connections.

        Everything is saved by then, so an error in here is ignored.
        """
        if self.size == 1:
            with suppress(RuntimeError):
                if dist.is_initialized():  # as in a task of Slurm's; NCCL complains in the log if nobody ends it
                    dist.destroy_process_group()
            return
        # Not by a collective: who waits in one cannot be told to wait for nobody any more.
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):
            store.add("closing", 1)
            while store.add("closing", 0) < self.size:
                if waits_for_nobody():
                    return
                time.sleep(0.1)
            # The first one, which keeps the store, leaves last: torch would print stack traces of those who still ask.
            if self.rank > 0:
                store.add("left", 1)
            deadline = time.monotonic() + LEAVING_S
            while self.rank == 0 and store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
        with suppress(RuntimeError):
            dist.destroy_process_group()


def start(processes: int, device: Kind, precision: Precision) -> World:
    """Joins the job's processes through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, which torch and Accelerate read.

    A process may call it again, for another precision: it stays in the group that it has joined.

    Raises JobError if this process should have a GPU and finds none, and RuntimeError if there are not `processes`
    processes: each that believes to be alone would train on its own and overwrite what the others write.
    """
    set_numerics(precision)
    own_device(device)  # raises at once, before the others wait for a process that has no GPU
    # Accelerate would name DDP the GPU of LOCAL_RANK, which is not there where each task is shown its own GPU alone.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    # A single process needs it, too: where RANK is set, Accelerate makes a group, at MASTER_PORT.
    if (port_file := os.environ.get("MASTER_PORT_FILE")) and not dist.is_initialized():
        _meet(Path(port_file), "nccl" if device == "cuda" else "gloo")
    gpus = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())] if device == "cuda" else []
    # Their names are asked first, because the check runs nvidia-smi, which may take a second.
    if any("RTX 40" in gpu for gpu in gpus) and not check_cuda_p2p_ib_support():
        # As `accelerate launch` does: with an older driver two of these have no direct path between them, and else
        # Accelerate refuses a machine that has two, also to use one.
        for variable in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(variable, "1")
    AcceleratorState._reset_state()  # it would insist on the first precision
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE)],
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


def _meet(port_file: Path, backend: str) -> None:
    """Makes the process group through a port that was free when process 0 took it, and that `port_file` then names.

    A port agreed on beforehand may be in use by anything on that machine, which would end the run.
    """
    rank, size, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    if rank == 0:
        # It must not wait for the others, who learn its port from the file that is written below.
        store = TCPStore(address, 0, size, is_master=True, timeout=MEETING, wait_for_workers=False)
        unseen = port_file.with_name(f".{port_file.name}")
        unseen.write_text(str(store.port))
        unseen.rename(port_file)  # the others read it as soon as they see its name
    else:
        deadline = time.monotonic() + MEETING.total_seconds()
        # By listing the folder: NFS may go on believing that a file which was not there is not there.
        while port_file.name not in os.listdir(port_file.parent):
            if time.monotonic() > deadline:
                raise MachineError(f"process {rank} waited {MEETING} in vain for process 0 to write {port_file}")
            time.sleep(0.05)
        store = TCPStore(address, int(port_file.read_text()), size, is_master=False, timeout=MEETING)
    # Before the group is made: NCCL waits for nobody when it is made, and gloo for as long as a collective may take.
    store.set(f"met-{rank}", "")
    store.wait([f"met-{other}" for other in range(size)], MEETING)
    if rank == 0:
        port_file.unlink()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE)


def _check_own_gpus(accelerator: Accelerator) -> None:
    """Raises JobError on every process if two of them share a GPU; NCCL would hang or fail later.

    Where a node's second GPU has fallen off its bus, its process is given the first: another node may help.
    The processes compare through the store by which they have met, because a collective would already hang.
    """
    gpu = torch.cuda.get_device_properties(accelerator.device)
    store = dist.distributed_c10d._get_default_store()
    uuid = uuid_of(accelerator.device) or accelerator.process_index
    store.set(f"gpu-of-{accelerator.process_index}", f"{gpu.name}, {uuid}")
    gpus = [store.get(f"gpu-of-{rank}").decode() for rank in range(accelerator.num_processes)]
    for rank, name in enumerate(gpus):
        if " MIG " in name:
            raise JobError(f"process {rank} has a MIG slice ({name}): slices cannot train together; use --gpus 1")
        if name in gpus[:rank]:
            raise MachineError(
                f"processes {gpus.index(name)} and {rank} have one and the same GPU ({name}); each needs one of its own"
            )
