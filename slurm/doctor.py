"""Examines a Slurm cluster, from its login node, for faults that would cost a job later."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from slurm import queue, site
from slurm.errors import UserError
from slurm.place import Job, OnSlurm
from slurm.profile import Profile
from slurm.submit import Shape

OLDEST = (20, 11)
"""Older versions of Slurm have no `squeue --me`."""
SAVE_S = 30
"""Seconds that a checkpoint of a large model takes on a busy file system."""


class Finding(NamedTuple):
    """What was found, why it matters, and what helps."""

    level: Literal["ok", "warning", "problem"]
    what: str
    why: str = ""
    cure: str = ""


def absent() -> Finding:
    """Says that this machine belongs to no cluster."""
    return Finding("ok", "no Slurm here: jobs run on this machine")


def silent() -> Finding:
    """Says that the cluster's controller does not answer in time."""
    return Finding(
        "problem",
        "sbatch is there, but the controller does not answer `scontrol ping` within 2 s",
        "no job starts unless you say where: --cluster slurm waits longer, --cluster local runs on this machine",
        "set SLURM_CONF, or wait until the controller is back: `sdiag` says more",
    )


def examine(place: OnSlurm, job: Job) -> Iterator[Finding]:
    """Yields findings about the cluster, and about the resources that the job asks for."""
    profile = place.profile if place.on_gpus else place.profile.without_gpus()
    config = queue.config(cluster=profile.cluster)
    yield _version(config)
    yield _accounting(config)
    yield _requeue(config)
    yield _array_size(config)
    partition = _partition(profile)
    yield from _stopping(config, partition or {})
    accepted = _acceptance(place, job)
    if partition is not None:
        yield from _limits(place, profile, partition)
    elif accepted.level != "ok":  # some sites choose it themselves
        yield _no_partition(profile)
        return
    yield accepted
    if place.on_gpus:
        yield _merging(place, job)


def written(found: site.Described, path: Path) -> Iterator[Finding]:
    """Says what was found out for a profile, and what was not."""
    count = found.requests
    yield Finding("ok", f"wrote {path}, after Slurm was asked about {count} request{'s' if count > 1 else ''}")
    for note in found.notes[:-1]:
        yield Finding("ok", note)
    yield Finding(
        "warning",
        found.notes[-1],
        "a job may lack what the profile does not say",
        f"edit {path}; --submit with more --gpus than a node has tries the network",
    )


def _version(config: dict[str, str]) -> Finding:
    shown = config.get("SLURM_VERSION", "unknown")
    version = tuple(map(int, re.findall(r"\d+", shown)[:2]))
    if version < OLDEST:
        least = ".".join(map(str, OLDEST))
        return Finding("problem", f"Slurm {shown}", f"it must be {least} or newer", "ask for an update")
    return Finding("ok", f"Slurm {shown}")


def _accounting(config: dict[str, str]) -> Finding:
    kind = config.get("AccountingStorageType", "(null)")
    minutes = _number(config.get("MinJobAge", "300")) // 60
    why = f"how a job ended can be asked for {minutes} minutes only; later `status` has only the run's own last words"
    if not kind.endswith("slurmdbd"):
        return Finding("warning", "no accounting: sacct knows nothing", why, "look soon, or ask for slurmdbd")
    # Any question shows whether it answers.
    answer = queue.ask("sacct", "--noheader", "--allocations", "--starttime=now")
    if answer.returncode != 0:
        return Finding(
            "warning", f"sacct does not answer: {queue.last_words(answer.stderr)}", why, "tell the administrators"
        )
    return Finding("ok", "accounting: sacct answers")


def _requeue(config: dict[str, str]) -> Finding:
    if config.get("JobRequeue") == "0":
        return Finding("ok", "JobRequeue=0: jobs are queued again if they ask for it, as those of launch.py do")
    told = "JobRequeue=1: jobs are queued again after a preemption or the loss of a node"
    if "enable_expedited_requeue" in config.get("SlurmctldParameters", ""):
        told += "; not expedited, for then Slurm holds a job that fails without a broken node"
    return Finding("ok", told)


def _array_size(config: dict[str, str]) -> Finding:
    size = _number(config.get("MaxArraySize", "1001"))
    if size <= 2:
        return Finding(
            "problem",
            f"MaxArraySize={size}: there are no arrays",
            "`sample` and `sweep` submit arrays",
            "ask for a larger MaxArraySize, or use one job: --cluster local inside an salloc",
        )
    several = f": `sample` and `sweep` submit one array for every {size} tasks" if size < 1001 else ""
    return Finding("ok", f"MaxArraySize={size}{several}")


def _stopping(config: dict[str, str], partition: dict[str, str]) -> Iterator[Finding]:
    """Says how jobs are told to stop, and how long they then have."""
    kill_wait = _number(config.get("KillWait", "30"))
    grace = _number(partition.get("GraceTime", "0"))
    # What the partition says counts; the cluster's own mode holds where it says nothing.
    preempts = partition.get("PreemptMode", config.get("PreemptMode", "OFF")) != "OFF"
    if not preempts or config.get("PreemptType") == "preempt/none":
        yield Finding("ok", "no preemption in this partition")
    elif "preempt_send_user_signal" not in config.get("SlurmctldParameters", ""):
        yield Finding(
            "warning",
            f"a preempted job is sent SIGTERM alone, and killed {grace + kill_wait} s later",
            "other tools take that for the end; jobs of launch.py save and queue themselves again",
            "ask for SlurmctldParameters=preempt_send_user_signal, or leave it so",
        )
    elif grace < SAVE_S:
        yield Finding(
            "warning",
            f"GraceTime={grace}: a preempted job has {grace} s to save",
            "what is not saved is computed again after the preemption",
            "save more often: --train.checkpoint-minutes 2",
        )
    else:
        yield Finding("ok", f"a preempted job is sent USR2 and has {grace} s to save")
    if kill_wait < SAVE_S:
        yield Finding(
            "warning",
            f"KillWait={kill_wait}: a cancelled job has {kill_wait} s to save",
            "a large checkpoint on a busy file system takes longer; the one before it is kept",
            "save more often: --train.checkpoint-minutes 2",
        )
    else:
        yield Finding("ok", f"KillWait={kill_wait}: a cancelled job has {kill_wait} s to save")


def _no_partition(profile: Profile) -> Finding:
    names = ", ".join(sorted(site.partitions(profile.cluster))) or "none"
    if profile.partition is None:
        return Finding(
            "problem", "there is no default partition", "jobs must name one", f"--slurm.partition, one of {names}"
        )
    return Finding(
        "problem",
        f"partition {profile.partition} does not exist, or is not yours to use",
        "Slurm refuses the job",
        f"--slurm.partition, or the profile's: one of {names}",
    )


def _limits(place: OnSlurm, profile: Profile, partition: dict[str, str]) -> Iterator[Finding]:
    """Says whether jobs of this shape fit into the partition."""
    name = partition["PartitionName"]
    if partition.get("State") != "UP":
        yield Finding(
            "problem", f"partition {name} is {partition.get('State')}", "jobs wait in it", "choose another one"
        )
    longest = site.minutes(partition.get("MaxTime", "UNLIMITED"))
    if longest is not None and profile.time_min > longest:
        yield Finding(
            "problem",
            f"time_min={profile.time_min} is over the limit of partition {name}, {longest} minutes",
            "the job would wait forever",
            f"--slurm.time-min {longest}: longer runs are queued again as often as they need",
        )
    shown = queue.ask(
        "sinfo",
        *queue.of_cluster(profile.cluster),
        "--noheader",
        "--Node",
        f"--partition={name}",
        "--format=%c|%m|%G|%t",
    ).stdout
    # sinfo writes 64+ where the nodes of a row differ.
    rows = re.findall(r"^ *(\d+)\+? *\| *(\d+)\+? *\|(.*)\| *(\S+) *$", shown, re.MULTILINE)
    nodes = [(int(cpus), int(mem), sum(site.gpus(gres).values())) for cpus, mem, gres, _ in rows]
    alive = [state for *_, state in rows if not state.startswith(("down", "drain", "drng", "fail", "unk"))]
    cpus, mem_mb, gpus = (max(column) for column in zip(*nodes, strict=True)) if nodes else (0, 0, 0)
    shape = Shape.of(place.processes, profile.gpus_per_node)
    if place.on_gpus:
        yield _fits(f"GPUs of a node in {name}", gpus, shape.tasks_per_node, "gpus-per-node")
    if place.on_gpus and shape.tasks_per_node <= gpus < profile.gpus_per_node:
        yield Finding(
            "warning",
            f"gpus_per_node={profile.gpus_per_node}, but a node in {name} has {gpus} GPUs",
            f"a job with more than {gpus} GPUs would wait forever for such a node",
            f"--slurm.gpus-per-node {gpus}, or the profile's",
        )
    asked_cpus = shape.tasks_per_node * profile.cpus_per_gpu
    yield _fits(f"CPUs of a node in {name}", cpus, asked_cpus, "cpus-per-gpu")
    if profile.mem_gb is not None:
        yield _fits(f"GB of memory of a node in {name}", mem_mb // 1024, profile.mem_gb, "mem-gb")
    yield _fits(f"nodes of {name} that are up", len(alive), shape.nodes, None)


def _fits(what: str, there: int, asked: int, flag: str | None) -> Finding:
    if asked <= there:
        return Finding("ok", f"{what}: {there}, asked for {asked}")
    cure = f"--slurm.{flag}, or the profile" if flag is not None else "fewer --gpus, or wait; `sinfo -R` says why"
    return Finding("problem", f"{what}: {there}, asked for {asked}", "the job would never start", cure)


def _acceptance(place: OnSlurm, job: Job) -> Finding:
    """Asks Slurm itself, which also knows accounts, qualities of service and constraints."""
    try:
        start = place.check(job)
    except UserError as error:
        cure = "`sacctmgr show assoc user=$USER` lists your accounts and qos; --write-profile tries other forms"
        return Finding("problem", str(error), "it would refuse every job of this kind", cure)
    tasks = f"{place.processes} task{'s' if place.processes > 1 else ''}"
    when = f"; it would start at {start}" if start else ""
    return Finding("ok", f"Slurm would take a job of {tasks} with these settings{when}")


def _merging(place: OnSlurm, job: Job) -> Finding:
    """Asks Slurm about a job without GPUs, such as the one that follows an array."""
    try:
        replace(place, processes=1, on_gpus=False).check(job)
    except UserError as error:
        cure = "another partition in the profile's table [cpu]"
        return Finding("problem", f"without GPUs: {error}", "samples could not be merged", cure)
    return Finding("ok", "Slurm would take a job without GPUs, which merges samples")


def _partition(profile: Profile) -> dict[str, str] | None:
    """Returns the profile's partition, or the default one; None if there is none."""
    found = site.partitions(profile.cluster)
    if profile.partition is not None:
        return found.get(profile.partition)
    return next((about for about in found.values() if about.get("Default") == "YES"), None)


def _number(text: str) -> int:
    """Reads the number at the start of a value such as `30 sec`."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0
