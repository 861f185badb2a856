"""Runs one job on several nodes of the allocation that this process is in, such as that of an `salloc`.

srun starts `python -m slurm.allocation` for each process, and hands its own stdin on to all of them.
"""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slurm import queue, signals, worker
from slurm.errors import UserError
from slurm.local import ROOT
from slurm.submit import Shape


@dataclass(frozen=True)
class Step:
    """The part of an allocation that a job takes."""

    shape: Shape
    cpus_per_task: int
    on_gpus: bool


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given to the job that this process is in."""

    nodes: int
    cpus: int
    """CPUs of all nodes together."""
    tasks: int
    """Tasks of all nodes together, as they were asked for."""
    gpus_per_node: int

    def step(self, processes: int, on_gpus: bool) -> Step | None:
        """Spreads the processes of a job, one for each GPU or task; None if there is room for them on one node.

        Raises UserError if there is none on all nodes together.
        """
        per_node = self.gpus_per_node if on_gpus else self.tasks // self.nodes
        if self.nodes == 1 or processes <= per_node:
            return None
        if processes > self.nodes * per_node:
            raise UserError(
                f"--gpus must be at most {self.nodes * per_node} in this allocation of {self.nodes} nodes, {per_node} "
                f"on each; got {processes} (--cluster local stays on this machine)"
            )
        shape = Shape.of(processes, per_node)
        return Step(shape, max(1, self.cpus // self.nodes // shape.tasks_per_node), on_gpus)


def around_us() -> Allocation | None:
    """Asks Slurm for the allocation that this process is in; None if it is in none."""
    if "SLURM_JOB_ID" not in os.environ or shutil.which("scontrol") is None:
        return None
    shown = queue.ask("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]).stdout
    record = next(iter(re.findall(r"^JobId=.*$", shown, re.MULTILINE)), "")
    if (found := re.search(r" NumNodes=(\d+) NumCPUs=(\d+) NumTasks=(\d+) ", record)) is None:
        return None
    nodes, cpus, tasks = map(int, found.groups())
    return Allocation(nodes, cpus, tasks, _gpus_per_node(record, nodes))


def _gpus_per_node(record: str, nodes: int) -> int:
    """Reads the GPUs: where they are accounted for, all of the job's are counted, elsewhere what was asked for."""
    if counted := re.search(r"\bgres/gpu=(\d+)", record):
        return int(counted[1]) // nodes
    asked = re.search(r"\bTresPerNode=(?:\S*,)?gres[:/]gpu(?::[^:=,\s]+)?[:=](\d+)", record)
    return int(asked[1]) if asked is not None else 0


def run(job: Callable[[], int], step: Step, port_file: Path, *, keep_open: Sequence[int] = ()) -> int:
    """Calls the picklable `job` in all processes of the step, and waits for them; returns an exit code.

    Signals are passed on to all of them, through their stdin, because srun has a mind of its own about some. If one
    process fails, the others are ended. If this one dies, they get SIGTERM. srun inherits the descriptors `keep_open`.
    """
    shape, cpus = step.shape, step.cpus_per_task
    srun = subprocess.Popen(
        [
            *("srun", f"--nodes={shape.nodes}", f"--ntasks={shape.tasks}", f"--ntasks-per-node={shape.tasks_per_node}"),
            *(f"--cpus-per-task={cpus}", "--distribution=block:block", "--kill-on-bad-exit=1", "--wait=0"),
            # --overlap: the shell of the allocation may be a step itself.
            *("--overlap", "--export=ALL", sys.executable, "-P", "-u", "-m", "slurm.allocation"),
        ],
        env={
            # Before the user's own variables, so that their number of threads counts.
            "OMP_NUM_THREADS": str(cpus),
            **os.environ,
            "MASTER_PORT_FILE": str(port_file),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C on the terminal reaches this process alone
        pass_fds=keep_open,
    )
    assert srun.stdin is not None
    pipe, told, content = srun.stdin.fileno(), False, pickle.dumps(job)

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        with suppress(BrokenPipeError):
            os.write(pipe, bytes([number]))

    srun.stdin.write(len(content).to_bytes(8, "big") + content)
    srun.stdin.flush()
    # Not before the job is in the pipe: the number of a signal would be read as a part of the job's size.
    previous = {number: signal.signal(number, forward) for number in signals.SAVE}
    try:
        code = srun.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with suppress(BrokenPipeError):
            srun.stdin.close()
    # Processes that have saved end with 0 (see `main`), so only this one knows that they were told to stop.
    return 130 if told and code == 0 else code


def main() -> None:
    """Says to torch.distributed who this process is, and does what a process on one machine does."""
    from submitit.slurm.slurm import _parse_node_list

    step, rank = os.environ, os.environ["SLURM_PROCID"]
    os.environ.update(
        RANK=rank,
        WORLD_SIZE=step["SLURM_NTASKS"],
        LOCAL_RANK=step["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(int(step["SLURM_NTASKS"]) // int(step["SLURM_STEP_NUM_NODES"])),
        MASTER_ADDR=_parse_node_list(step["SLURM_STEP_NODELIST"])[0],
    )
    if rank != "0":  # on several nodes as on one, process 0 prints for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = worker.work()
    # For srun 130 would be a failure, for which it ends those that are still saving.
    worker.leave(0 if code == 130 else code)


if __name__ == "__main__":
    main()
