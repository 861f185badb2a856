"""A short job that tries out what a training needs of a cluster."""

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.doctor.machine import Finding
from jobs.files import write_json
from jobs.runtime.job import Requeue, process_rank

if TYPE_CHECKING:
    from jobs.runtime.numerics import Kind
    from jobs.runtime.world import World

FILES_PATIENCE_S = 30.0
"""Seconds that a node may take to see a new file of another node: NFS remembers for a while that it was missing."""
EXCHANGED = 1 << 22
"""Numbers that each task sends and receives in the trial: 16 MiB, which GPUs move otherwise than a single number."""
P2P = (
    "NCCL_P2P_DISABLE=1 in the profile's environment: if it helps, the direct path between the GPUs of a node "
    "is at fault (IOMMU, PCIe ACS)"
)


@dataclass(frozen=True)
class DoctorJob:
    """Tries out what a training needs of a cluster: GPUs, a network between the tasks, a folder that all of them see.

    Each task writes into `folder` what it found.
    """

    folder: Path
    processes: int
    device: "Kind"

    def __call__(self, requeue: Requeue | None = None) -> int:
        rank = process_rank()
        try:
            result = self._try(rank)
            write_json(self.folder / f"result-{rank}.json", result)
        except Exception:
            self.failed(rank, traceback.format_exc())
            return 1
        return 1 if self._lacks_gpus(result) else 0

    def _try(self, rank: int) -> dict[str, Any]:
        # Here, so that a torch that cannot be imported on the node is a result like any other failure.
        import torch

        result = {
            "node": os.environ.get("SLURMD_NODENAME", platform.node()),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpus": torch.cuda.device_count() if self.device == "cuda" else 0,
            "tasks_here": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        }
        if self._lacks_gpus(result):
            return result
        from jobs.runtime.world import start

        (self.folder / f"seen-{rank}").touch()
        world = start(self.processes, self.device, "fp32")
        started = time.perf_counter()
        mean = float(world.sum(torch.tensor(float(rank), device=world.device))) / world.size
        seconds = time.perf_counter() - started
        wrong_from = wrong_senders(world)
        unseen = self._unseen()  # after the reduction all have written theirs
        world.close()
        return {**result, "mean": mean, "reduce_s": seconds, "wrong_from": wrong_from, "unseen": unseen}

    def _lacks_gpus(self, result: dict[str, Any]) -> bool:
        # A single one may be the task's own, where Slurm binds GPUs to tasks: then the training finds out.
        return self.device == "cuda" and bool(result["gpus"] == 0 or 1 < result["gpus"] < result["tasks_here"])

    def _unseen(self) -> list[int]:
        """Returns the tasks whose files cannot be seen from here."""
        deadline = time.monotonic() + FILES_PATIENCE_S
        while missing := [rank for rank in range(self.processes) if not (self.folder / f"seen-{rank}").exists()]:
            if time.monotonic() > deadline:
                break
            os.listdir(self.folder)  # makes NFS look again
            time.sleep(0.5)
        return missing

    def failed(self, rank: int, trace: str) -> None:
        print(trace, file=sys.stderr, flush=True)
        write_json(self.folder / f"failed-{rank}.json", {"traceback": trace})

    def submitted(self, submit: Callable[[], str]) -> str:
        # Nothing keeps the id: the command that submits this job waits for its end.
        return submit()

    def is_over(self) -> bool:
        """Whether each task has left what it found, or why it failed."""
        return all(self._read(f"result-{rank}") or self._read(f"failed-{rank}") for rank in range(self.processes))

    def findings(self) -> Iterator[Finding]:
        """Yields what the tasks found, after the job has ended."""
        results = {rank: result for rank in range(self.processes) if (result := self._read(f"result-{rank}"))}
        lacking = {rank: result for rank, result in results.items() if self._lacks_gpus(result)}
        for rank, result in lacking.items():
            yield Finding(
                "problem",
                f"task {rank} on {result['node']} sees {result['gpus']} GPUs, of which {result['tasks_here']} tasks "
                f"need one each (CUDA_VISIBLE_DEVICES={result['visible']})",
                "a training would not start",
                "`nvidia-smi` in a job, and the profile's gpus_per_node; the driver may be too old for this torch",
            )
        missing = [rank for rank in range(self.processes) if rank not in results]
        if missing and not lacking:
            yield self._failure(missing)
        if missing or lacking:
            return
        nodes = ", ".join(dict.fromkeys(result["node"] for result in results.values()))
        yield Finding("ok", f"a job of {self.processes} tasks ran on {nodes}")
        if self.device == "cuda":
            yield Finding("ok", f"GPUs that each task sees: {', '.join(str(r['gpus']) for r in results.values())}")
        yield from self._network(results)
        unseen = {rank: result["unseen"] for rank, result in results.items() if result["unseen"]}
        if unseen:
            yield Finding(
                "problem",
                f"in {self.folder.parent} task {next(iter(unseen))} does not see what others write",
                "a run's folder must be one and the same on all nodes",
                "--runs-dir on a file system that all nodes share",
            )
        else:
            yield Finding("ok", "what a task writes into the folder of runs, all others see")

    def _network(self, results: dict[int, dict[str, Any]]) -> Iterator[Finding]:
        # The mean of 0, 1, ..., n - 1. It is exact: sums of small whole numbers are not rounded.
        expected = (self.processes - 1) / 2
        wrong = [rank for rank, result in results.items() if result["mean"] != expected]
        slowest_ms = 1000 * max(result["reduce_s"] for result in results.values())
        cure = P2P if self.device == "cuda" else "report this, please"
        if garbled := [(rank, sender) for rank, result in results.items() for sender in result["wrong_from"]]:
            rank, sender = garbled[0]
            yield Finding(
                "problem",
                f"task {rank} on {results[rank]['node']} received wrong numbers from task {sender} on "
                f"{results[sender]['node']}; that is so in {len(garbled)} of {self.processes**2} pairs of tasks",
                "training would be wrong",
                cure if results[rank]["node"] == results[sender]["node"] else "report this, please",
            )
        elif wrong:
            yield Finding("problem", f"wrong sum in tasks {wrong}", "training would be wrong", cure)
        elif self.processes > 1:
            yield Finding("ok", f"the tasks reach each other; a first all-reduce took {slowest_ms:.0f} ms")

    def _failure(self, missing: list[int]) -> Finding:
        traces = [str(found["traceback"]) for rank in missing if (found := self._read(f"failed-{rank}"))]
        if traces:
            last = traces[0].strip().splitlines()[-1]
            cure = 'interface = "auto", or host_suffix, in the profile, where the network is to blame'
            return Finding("problem", f"the test job failed: {last}", "a training would, too", cure)
        log = f"its output is in {self.folder}/slurm, if it could write there"
        return Finding(
            "problem",
            f"nothing came back from tasks {', '.join(map(str, missing))}",
            "the job died early, its tasks wait for each other, or the runs' folder is not the same on its nodes",
            f"{log}; {P2P}" if self.device == "cuda" and self.processes > 1 else log,
        )

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / f"{name}.json").read_text()))
        except FileNotFoundError:
            return {}


def wrong_senders(world: "World") -> list[int]:
    """Moves numbers as a training moves gradients; returns the tasks, itself included, from which wrong ones came.

    Every process must call it.
    """
    import torch
    import torch.distributed as dist

    from jobs.runtime.world import all_gather

    if world.size == 1:
        return []
    # Whole numbers below 2^24, which fp32 holds exactly; no two of a task's are equal.
    numbers = torch.arange(EXCHANGED // world.size * world.size, device=world.device, dtype=torch.float32)
    pieces = numbers.view(world.size, -1)  # [tasks, piece], a piece for each task
    exchanged, gathered = torch.zeros_like(pieces), torch.zeros_like(pieces)
    dist.all_to_all_single(exchanged.flatten(), (pieces + world.rank).flatten())
    all_gather(gathered.flatten(), pieces[world.rank])
    expected = pieces[world.rank] + torch.arange(world.size, device=world.device)[:, None]
    wrong = (exchanged != expected) | (gathered != pieces)
    return [rank for rank, is_wrong in enumerate(wrong.any(1).tolist()) if is_wrong]
