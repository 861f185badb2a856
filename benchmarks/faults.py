"""How long a fault costs: `python -m benchmarks.faults [--cluster slurm]` prints the table of docs/faults.md.

With `--cluster slurm` it needs the cluster on this machine that `python -m slurm.devcluster up` starts, because the
processes and nodes that it harms must be here.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jobs.storage import faults
from jobs.storage.provenance import ROOT
from jobs.storage.records import last_step, read_jsonl
from jobs.storage.run_folder import RunFolder
from slurm.devcluster import DevCluster
from slurm.devcluster.processes import kill_all

EVERY = 500
"""Steps between checkpoints."""
TRAINING = (
    *("train", "1d", "--train.steps", 10_000_000, "--train.checkpoint-every", EVERY, "--train.log-every", 10),
    *("--device", "cpu", "--gpus", 2, "--retries", 3),
)
SLURM = ("--slurm.cpus-per-gpu", 1, "--slurm.gpus-per-node", 2)
PATIENCE_S = 600

Misfortune = Callable[[RunFolder], AbstractContextManager[None]]
"""Strikes a run when it is entered, and repairs what it has broken when it is left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local")
    cluster = parser.parse_args().cluster
    misfortunes: dict[str, Misfortune] = {
        f"{number.name} to one of two processes": partial(hit, number)
        for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP)
    }
    if cluster == "slurm":
        misfortunes |= {"the job is preempted": preempt, "its node is lost": lose_node}
    print("| fault | noticed after | at work again after | steps lost |\n|---|---|---|---|")
    for what, strike in misfortunes.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            noticed_s, working_s, lost = measured(strike, Path(folder), cluster)
        # Slurm itself queues the job again after the others: they are no faults of the run.
        if len(noticed_s) != isinstance(strike, partial):
            raise RuntimeError(f"{what}: faults.jsonl has {len(noticed_s)} lines")
        where = "here" if cluster == "local" else "on Slurm"
        noticed = f"{noticed_s[0]:.0f} s" if noticed_s else "-"
        print(f"| {what}, {where} | {noticed} | {working_s:.0f} s | {lost} |")


def measured(strike: Misfortune, folder: Path, cluster: str) -> tuple[list[float], float, int]:
    """Strikes a training; returns seconds until each line of faults.jsonl and until at work again, and steps lost."""
    command = [sys.executable, ROOT / "launch.py", *TRAINING, "--cluster", cluster, "--name", "a"]
    command += SLURM if cluster == "slurm" else ()
    run = RunFolder(folder / "runs" / "1d" / "a")
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: last_step(run.metrics) >= 2 * EVERY + EVERY // 2)  # the mean of what may be lost
        at, before = time.time(), last_step(run.metrics)

        def is_back() -> bool:
            nonlocal before
            step, back = last_step(run.metrics), len(starts(run)) == 2
            before = before if back else max(before, step)
            return back

        with strike(run):
            wait_until(is_back)
            again = starts(run)[1]["step"]
            wait_until(lambda: last_step(run.metrics) > again)
            working_s = time.time() - at
        noticed_s = [datetime.fromisoformat(fault.time).timestamp() - at for fault in faults.read(run)]
        return noticed_s, working_s, max(0, before - again)
    finally:
        subprocess.run([sys.executable, ROOT / "launch.py", "cancel", run.path], stdout=subprocess.DEVNULL, check=False)
        process.wait()


@contextmanager
def hit(number: signal.Signals, run: RunFolder) -> Iterator[None]:
    os.kill(second(run), number)
    yield


@contextmanager
def preempt(run: RunFolder) -> Iterator[None]:
    """Submits a job that takes all nodes away from it for a moment."""
    cluster = dev_cluster()
    cluster.submit("sleep 2", "--partition=high", f"--nodes={len(cluster.nodes)}", "--exclusive")
    yield


@contextmanager
def lose_node(run: RunFolder) -> Iterator[None]:
    """Ends all processes of its node at once, as a power failure does, and starts the node again afterwards."""
    cluster, node = dev_cluster(), environment_of(run.read_status()["pid"])["SLURMD_NODENAME"]
    kill_all(cluster.dir, node)
    try:
        yield
    finally:
        cluster.start_node(node)


def dev_cluster() -> DevCluster:
    cluster = DevCluster.find(Path(os.environ["SLURM_CONF"]).parent)
    assert cluster is not None
    return cluster


def starts(run: RunFolder) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run.timing) if line.get("event") == "start"]


def second(run: RunFolder) -> int:
    """Returns the second process of the job whose first one writes status.json."""
    first = environment_of(run.read_status()["pid"])
    rank, job = ("SLURM_PROCID", "SLURM_JOB_ID") if "SLURM_PROCID" in first else ("RANK", "MASTER_PORT_FILE")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, found = (path / "cmdline").read_bytes(), environment_of(int(path.name))
        except OSError:  # another user's, or it has just ended
            continue
        # srun's own command line names what it starts.
        works = b"slurm.worker" in command or (b"submitit.core._submit" in command and b"srun" not in command)
        if works and found.get(rank) == "1" and found.get(job) == first[job]:
            return int(path.name)
    raise RuntimeError("there is no second process")


def environment_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the run did not come so far in time")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
