"""How a job computes: the device of a process, precision, and kernels that give the same bytes each time."""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion.errors import OutsideError, UserError
from jobs.runtime.job import MachineError, process_node

Kind = Literal["cuda", "cpu"]
Precision = Literal["bf16", "tf32", "fp32"]
Asked = Literal["auto", "bf16", "tf32", "fp32"]

DEV = Path("/dev")
"""Where a Linux machine shows its NVIDIA GPUs, as nvidia0, nvidia1, ..."""
SAME_BYTES = ("device", "gpu", "precision", "grad_shards", "compile", "torch", "cuda", "cudnn", "nccl")
"""Two starts of a run compute the same bytes if these facts agree; on a CPU, `SAME_BYTES_OF_CPUS` must agree too."""
SAME_BYTES_OF_CPUS = ("cpu", "threads")


def resolve_device(device: Literal["auto", "cuda", "cpu"], gpus: int | None) -> Kind:
    """The kind of device to run on, for the launcher on the machine that computes.

    Raises UserError where GPUs were asked for that are not there, and OutsideError where `auto` would compute on the
    CPU of a machine whose GPUs torch cannot use.
    """
    found = torch.cuda.device_count()
    if device == "cuda" and found == 0:
        raise UserError(f"--device cuda needs a CUDA GPU; torch finds none ({whereabouts()})")
    if device == "cpu":
        return "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # somebody wants it so
    if found == 0 and not hidden and any(DEV.glob("nvidia[0-9]*")):
        raise OutsideError(
            f"this machine has GPUs, but torch {torch.__version__} cannot use them ({whereabouts()}): its CUDA may be "
            "newer than the driver, see `python launch.py doctor`; --device cpu computes on the CPU"
        )
    if gpus is not None and gpus > found:
        raise UserError(
            f"--gpus must not exceed the GPUs of this machine, of which torch finds {found}; got {gpus} "
            f"(--device cpu --gpus {gpus} rehearses with CPU processes)"
        )
    return "cuda" if found else "cpu"


def own_device(kind: Kind) -> torch.device:
    """The device of this process: on a GPU machine that of its LOCAL_RANK, or the only one that it is shown.

    CUDA's current device is that one from now on: streams, and so CUDA graphs, are of the current one, whichever GPU
    the tensors are on.
    Raises MachineError where there is none for it: what was sent to a GPU must not compute on the CPU in silence. One
    of a node's GPUs may have fallen off its bus.
    """
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", _own_index())
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # a GPU that is counted may still refuse to work
    except RuntimeError as error:
        raise MachineError(
            f"{whereabouts()} cannot use its GPU {device.index}: {str(error).splitlines()[0]}"
        ) from error
    return device


def _own_index() -> int:
    """The number of this process's GPU among those it is shown; computes nothing there. Raises as `own_device`."""
    found, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if found == 0:
        raise MachineError(f"{whereabouts()} finds no GPU; the driver may be too old for torch {torch.__version__}")
    if rank >= found > 1:
        raise MachineError(
            f"{whereabouts()} is number {rank} of its node and sees {found} GPUs; each needs one of its own"
        )
    # A single one is this task's own where Slurm binds GPUs to tasks; if it is not, jobs/runtime/world.py finds out.
    return rank if rank < found else 0


def whereabouts() -> str:
    """Says which process this is, where, and which GPUs it is shown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    return f"process {os.environ.get('RANK', '0')} on {process_node()}, CUDA_VISIBLE_DEVICES={visible},"


def resolve_precision(asked: Asked, kind: Kind) -> Precision:
    """The precision itself: for `auto` bf16 where the hardware really computes in it, else fp32.

    Accelerate's own test says yes on every CPU. Raises JobError where there is no GPU to ask.
    """
    if asked != "auto":
        return asked
    if kind == "cuda":
        return "bf16" if gpu_computes_bf16(_own_index()) else "fp32"
    return "bf16" if computes_bf16() else "fp32"


def gpu_computes_bf16(gpu: int) -> bool:
    """Whether a GPU computes in bf16, and in TF32: since Ampere; older ones only imitate it, slowly."""
    return torch.cuda.get_device_capability(gpu) >= (8, 0)


def computes_bf16() -> bool:
    """Whether this machine's CPU computes in bf16; others only imitate it, slowly."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def lacking(precision: Asked, kind: Kind) -> str | None:
    """Says why this machine cannot compute in a precision, None if it can. Any CPU can imitate bf16."""
    if precision == "tf32" and kind == "cpu":
        return "precision tf32 needs a GPU; a CPU computes in bf16 or fp32"
    if precision in ("bf16", "tf32") and kind == "cuda":
        gpu = _own_index()
        if not gpu_computes_bf16(gpu):
            return f"{torch.cuda.get_device_name(gpu)} does not compute in {precision}; it needs another GPU, or fp32"
    return None


def set_numerics(precision: Precision) -> None:
    """Sets all that equal bytes depend on, for every job, before a GPU computes.

    fp32 is IEEE fp32 in matrix products and convolutions alike: TF32, which keeps 10 bits of the mantissa, has a name
    of its own. cuDNN is kept to algorithms that add in a fixed order, and cuBLAS to a fixed workspace, on whose size
    the choice of its algorithm depends.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # it times kernels and takes the fastest, at the next start another
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 alone calls these two names old
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def uuid_of(device: torch.device) -> str | None:
    """Returns what a GPU is called wherever it is seen from; None on a CPU, and where torch is too old to know it."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def facts(device: torch.device) -> dict[str, Any]:
    """Returns what the bytes of a result depend on besides its settings, as this process finds it."""
    found: dict[str, Any] = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        driver = Path("/sys/module/nvidia/version")
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": driver.read_text().strip() if driver.exists() else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def shared(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the facts of a job, which each start records, from those of its processes.

    Of the device it is the first one's; where another fact differs, it is all values in one string.
    """
    values = {name: {process[name] for process in found} for name in found[0] if name != "device"}
    return found[0] | {name: _listed(several) for name, several in values.items() if len(several) > 1}


def mixed(found: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what bytes depend on and is not the same on all processes of a job, in words.

    Each process computes the norm of the gradient, by which it is clipped, and a sum on another kind of machine differs
    in its last bits. So the weights of processes drift apart, until all continue from those that the first has saved.
    """
    first, job = found[0], shared(found)
    names = _on_which_bytes_depend(first)
    return [f"the processes differ in {name} ({job[name]})" for name in names if job.get(name) != first.get(name)]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what bytes depend on and is not the same in both, in words.

    A fact that only one of them has recorded counts as equal, because older versions recorded fewer.
    """
    return [
        f"{name} {before[name]} before, {now[name]} now"
        for name in _on_which_bytes_depend(now)
        if name in before and name in now and _kind_of(before[name]) != _kind_of(now[name])
    ]


def _on_which_bytes_depend(now: dict[str, Any]) -> tuple[str, ...]:
    return (*SAME_BYTES, *(SAME_BYTES_OF_CPUS if now.get("device") == "cpu" else ()))


def _kind_of(fact: Any) -> Any:
    """Drops the number of a GPU: cuda:3 and cuda:0 are of one kind."""
    return fact.partition(":")[0] if isinstance(fact, str) else fact
