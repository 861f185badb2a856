"""Examines a Slurm cluster, from its login node, for faults that would cost a job later."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from slurm import queue
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
    config = queue.config()
    yield _version(config)
    yield _accounting(config)
    yield _requeue(config)
    yield _array_size(config)
    partition = _partition(place.profile.partition)
    yield from _stopping(config, partition or {}, place.profile)
    if partition is None:
        yield _no_partition(place.profile)
        return
    yield from _limits(place, partition)
    yield _acceptance(place, job)


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
        return Finding(
            "warning",
            "JobRequeue=0: jobs are not queued again after a preemption or the loss of a node",
            "a long run consists of several jobs under one id",
            "nothing to do for jobs of launch.py, which ask for it; your own scripts need `#SBATCH --requeue`",
        )
    return Finding("ok", "JobRequeue=1: jobs are queued again after a preemption or the loss of a node")


def _array_size(config: dict[str, str]) -> Finding:
    size = _number(config.get("MaxArraySize", "1001"))
    if size <= 2:
        return Finding(
            "problem",
            f"MaxArraySize={size}: there are no arrays",
            "`sample` and `sweep` submit arrays",
            "ask for a larger MaxArraySize, or use one job: --cluster local inside an salloc",
        )
    if size < 1001:
        return Finding(
            "warning",
            f"MaxArraySize={size}, less than the usual 1001",
            f"`sample` and `sweep` submit one array for every {size} tasks",
            "nothing to do unless the number of jobs in the queue is limited, too",
        )
    return Finding("ok", f"MaxArraySize={size}")


def _stopping(config: dict[str, str], partition: dict[str, str], profile: Profile) -> Iterator[Finding]:
    """Says how jobs are told to stop, and how long they then have."""
    kill_wait = _number(config.get("KillWait", "30"))
    grace = _number(partition.get("GraceTime", "0"))
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
    if profile.signal_delay_s >= 60 * profile.time_min:
        yield Finding(
            "problem",
            f"signal_delay_s={profile.signal_delay_s} is not less than the time limit of {profile.time_min} minutes",
            "a job would be told to stop before it starts",
            "a longer --slurm.time-min or a shorter --slurm.signal-delay-s",
        )


def _no_partition(profile: Profile) -> Finding:
    names = ", ".join(sorted(_partitions())) or "none"
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


def _limits(place: OnSlurm, partition: dict[str, str]) -> Iterator[Finding]:
    """Says whether jobs of this shape fit into the partition."""
    profile, name = place.profile, partition["PartitionName"]
    if partition.get("State") != "UP":
        yield Finding(
            "problem", f"partition {name} is {partition.get('State')}", "jobs wait in it", "choose another one"
        )
    longest = _minutes(partition.get("MaxTime", "UNLIMITED"))
    if longest is not None and profile.time_min > longest:
        yield Finding(
            "problem",
            f"time_min={profile.time_min} is over the limit of partition {name}, {longest} minutes",
            "the job would wait forever",
            f"--slurm.time-min {longest}: longer runs are queued again as often as they need",
        )
    shown = queue.ask("sinfo", "--noheader", "--Node", f"--partition={name}", "--format=%c|%m|%G|%t").stdout
    rows = re.findall(r"^ *(\d+)\+? *\| *(\d+)\+? *\|(.*)\| *(\S+) *$", shown, re.MULTILINE)
    nodes = [(int(cpus), int(mem), _gpus(gres)) for cpus, mem, gres, _ in rows]
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
        yield _fits(f"GB of memory of a node in {name}", mem_mb // 1000, profile.mem_gb, "mem-gb")
    yield _fits(f"nodes of {name} that are up", len(alive), shape.nodes, None)


def _fits(what: str, there: int, asked: int, flag: str | None) -> Finding:
    if asked <= there:
        return Finding("ok", f"{what}: {there}, asked for {asked}")
    cure = f"--slurm.{flag}, or the profile" if flag is not None else "fewer --gpus, or wait; `sinfo -R` says why"
    return Finding("problem", f"{what}: {there}, asked for {asked}", "the job would never start", cure)


def _acceptance(place: OnSlurm, job: Job) -> Finding:
    """Asks Slurm itself, which also knows accounts, qualities of service and constraints."""
    try:
        place.check(job)
    except UserError as error:
        cure = "`sacctmgr show assoc user=$USER` lists your accounts and qos"
        return Finding("problem", str(error), "it would refuse every job of this kind", cure)
    return Finding(
        "ok",
        f"Slurm would take a job of {place.processes} task{'s' if place.processes > 1 else ''} with these settings",
    )


def _partition(name: str | None) -> dict[str, str] | None:
    """Returns the partition of this name, or the default one; None if there is none."""
    partitions = _partitions()
    if name is not None:
        return partitions.get(name)
    return next((fields for fields in partitions.values() if fields.get("Default") == "YES"), None)


def _partitions() -> dict[str, dict[str, str]]:
    shown = queue.ask("scontrol", "--oneliner", "show", "partition").stdout
    records = re.findall(r"^PartitionName=.*$", shown, re.MULTILINE)  # among a site's notices
    found = [dict(re.findall(r"(\w+)=(\S*)", record)) for record in records]
    return {fields["PartitionName"]: fields for fields in found}


def _gpus(gres: str) -> int:
    """Reads the number of GPUs from a node's resources, such as gpu:a100:4(S:0-1),gpu:2."""
    bare = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", bare))


def _number(text: str) -> int:
    """Reads the number at the start of a value such as `30 sec`."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _minutes(limit: str) -> int | None:
    """Reads a time limit such as 7-00:00:00 in minutes; None if there is no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", limit)
    if found is None:
        return None
    days, hours, minutes = (int(part or 0) for part in found.groups())
    return (24 * days + hours) * 60 + minutes
