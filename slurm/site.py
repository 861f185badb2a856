"""Describes a cluster as a profile: what it says of itself, and the plainest request that it takes."""

import getpass
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from slurm import queue
from slurm.environment import network
from slurm.errors import UserError
from slurm.place import Job, OnSlurm
from slurm.profile import FOLDER, INTERFACES, MEMORY, Profile

MOST_REQUESTS = 400
"""Slurm is asked about at most so many requests, the plainest first."""
USUAL_MIN = 240
"""Time limit where the site allows it: short ones start sooner."""


class Nodes(NamedTuple):
    """Equal nodes of a partition."""

    partition: str
    cpus: int
    mem_mb: int
    gpus: int
    gpu_type: str | None
    number: int


class Described(NamedTuple):
    """A profile that Slurm takes, and how it was found."""

    profile: Profile
    requests: int
    """How many requests Slurm was asked about."""
    notes: list[str]
    """What else the cluster has, and what could not be known."""


def profile_path(name: str) -> Path:
    """Where a profile of this name, or with this path, is to be written; raises UserError if it is there already."""
    path = Path(name).expanduser() if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not re.fullmatch(r"[\w.-]+", path.name):
        raise UserError(
            f"--write-profile must be a name of letters, digits, ., _ and -, or a path to a .toml; got {name}"
        )
    if path.exists():
        raise UserError(f"{path} is there already; choose another name for --write-profile, or remove it")
    return path


def describe(place: OnSlurm, job: Job, given: dict[str, Any]) -> Described:
    """Finds a profile with which Slurm takes the job, and one that needs no GPU; what is `given` stays as it is.

    Nothing is submitted. Raises UserError with Slurm's words for the plainest request if it takes none.
    """
    given = {name: value for name, value in given.items() if value is not None}  # None asks for nothing
    cluster = given.get("cluster")
    kinds = nodes(cluster)
    names = list(dict.fromkeys(kind.partition for kind in kinds))
    if given.get("partition", next(iter(names), None)) not in names:
        raise UserError(f"a profile needs a partition that is up, one of {', '.join(names) or 'none'}")
    # The profile is not for this one command alone, which may have been told --device cpu.
    on_gpus = any(kind.gpus for kind in kinds if given.get("partition") in (None, kind.partition))
    place = replace(place, on_gpus=on_gpus)
    known = rights(cluster)
    refusal = None
    for asked, profile in enumerate(_candidates(kinds, known, given), 1):
        try:
            replace(place, profile=profile).check(job)
        except UserError as error:
            refusal = refusal or error
            continue
        whole, notes = _with_cpu(place, job, profile, kinds, known.accounts)
        return Described(whole, asked, [*notes, *_notes(kinds, known.accounts)])
    raise UserError(f"Slurm took no form of request. Of the plainest it said: {refusal}")


def content(found: Described, about: str) -> bytes:
    """Writes the profile as TOML, after a line of comment; raises UserError for letters that TOML cannot hold."""
    said, defaults = asdict(found.profile), Profile()
    always = ("gpus_per_node", "cpus_per_gpu", "time_min", "signal_delay_s")
    told = [f.name for f in fields(Profile) if f.name in always or said[f.name] != getattr(defaults, f.name)]
    lines = [f"# {about}", ""]
    lines += [f"{name} = {_toml(said[name])}" for name in told if not isinstance(said[name], dict)]
    lines += ["", *(f"# {note}" for note in found.notes)]
    for name in told:
        if isinstance(said[name], dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in said[name].items())]
    try:
        return ("\n".join(lines) + "\n").encode()
    except UnicodeEncodeError as error:
        letters = error.object[error.start : error.end]
        raise UserError(f"a profile is text in UTF-8, which has no {letters!r}; give a --slurm without it") from None


def _toml(value: object) -> str:
    """Writes a value as TOML, which Python only reads: JSON's strings, numbers, booleans and lists are TOML's, too."""
    # Letters as they are: JSON would write an emoji as two halves, which TOML refuses. TOML escapes DEL, JSON does not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def partitions(cluster: str | None = None) -> dict[str, dict[str, str]]:
    """Returns what Slurm says of each partition, by name."""
    command = ("scontrol", *queue.of_cluster(cluster), "--oneliner", "show", "partition")
    records = re.findall(r"^PartitionName=.*$", queue.ask(*command).stdout, re.MULTILINE)  # among a site's notices
    found = [dict(re.findall(r"(\w+)=(\S*)", record)) for record in records]
    return {about["PartitionName"]: about for about in found}


def nodes(cluster: str | None = None) -> list[Nodes]:
    """Returns the nodes of the partitions that are up.

    Those with GPUs come first, of them those of the default partition, of these the kind that has most GPUs in all.
    """
    up = {name: about for name, about in partitions(cluster).items() if about.get("State") == "UP"}
    # --exact: otherwise nodes that differ share a row, with the least of their numbers.
    command = ("sinfo", *queue.of_cluster(cluster), "--noheader", "--exact", "--format=%R|%c|%m|%G|%D")
    rows = re.findall(
        r"^(\S+) *\| *(\d+)\+? *\| *(\d+)\+? *\|(.*)\| *(\d+) *$", queue.ask(*command).stdout, re.MULTILINE
    )
    found = [
        Nodes(partition, int(cpus), int(mem), sum(gpus(gres).values()), next(iter(gpus(gres)), None), int(count))
        for partition, cpus, mem, gres, count in rows
        if partition in up
    ]
    return sorted(
        found,
        key=lambda kind: (kind.gpus == 0, up[kind.partition].get("Default") != "YES", -kind.gpus * kind.number),
    )


def gpus(gres: str) -> dict[str | None, int]:
    """Reads the GPUs of a node, by type, from its resources such as gpu:a100:4(S:0-1),gpu:2."""
    bare = re.sub(r"\([^)]*\)", "", gres)
    found = re.findall(r"(?:^|,)gpu(?::([^:,]+))?:(\d+)(?=,|\s*$)", bare)
    return {kind or None: int(count) for kind, count in found}


def minutes(limit: str) -> int | None:
    """Reads a time limit such as 7-00:00:00 in minutes; None if there is no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", limit)
    if found is None:
        return None
    days, hours, rest = (int(part or 0) for part in found.groups())
    return (24 * days + hours) * 60 + rest


class Rights(NamedTuple):
    """What the accounting grants a user; nothing of it is known where there is none."""

    accounts: list[str]
    qualities: list[str]
    """Qualities of service."""
    max_jobs: int | None
    """The strictest limit on jobs in the queue."""


def rights(cluster: str | None = None) -> Rights:
    """Asks the accounting what this user may do."""
    of = [f"cluster={cluster}"] if cluster else []
    user = f"user={getpass.getuser()}"
    rows = [*_accounting("assoc", user, *of, "format=account,qos,maxsubmit")]
    accounts, qualities, limits = ([row[i] for row in rows if row[i]] for i in range(3))
    own = dict.fromkeys(name for names in qualities for name in names.split(","))
    limits += [limit for name, limit in _accounting("qos", "format=name,maxsubmitpu") if name in own and limit]
    # A profile takes no max_jobs below 2, because an array and the job that follows it are two.
    return Rights(list(dict.fromkeys(accounts)), list(own), max(2, min(map(int, limits))) if limits else None)


def _accounting(*asked: str) -> Iterator[list[str]]:
    """Yields the rows that sacctmgr shows."""
    columns = asked[-1].count(",") + 1
    try:
        shown = queue.ask("sacctmgr", "--noheader", "--parsable2", "show", *asked)
    except FileNotFoundError:
        return
    for line in shown.stdout.splitlines() if shown.returncode == 0 else []:
        # Other lines are a site's notices.
        if len(cells := line.split("|")) == columns:
            yield cells


def _candidates(kinds: list[Nodes], known: Rights, given: dict[str, Any]) -> Iterator[Profile]:
    """Yields the profiles to try: those that say least of their own first."""
    first = {kind.partition: kind for kind in reversed(kinds)}  # of each partition the nodes that come first
    about, config = partitions(given.get("cluster")), queue.config(cluster=given.get("cluster"))
    usual = [
        kind for kind in kinds if first[kind.partition] is kind and given.get("partition") in (None, kind.partition)
    ]
    places: list[tuple[Nodes, dict[str, Any]]] = [(kind, {"partition": kind.partition}) for kind in usual[:4]]
    # Also without a partition: some sites choose it themselves, by constraint or quality of service.
    places += [(kind, {}) for kind in usual[:1]]
    forms = ("gpus-per-node", "gres", "gpus-per-task")
    requests = [*((form, typed) for typed in (False, True) for form in forms), ("none", False)]
    of_accounts: list[dict[str, Any]] = [{}, *({"account": account} for account in known.accounts[:5])]
    of_qualities: list[dict[str, Any]] = [{}, *({"qos": quality} for quality in known.qualities[:4])]
    # 5 is the most ways to ask for memory that `_memory` knows, and 2 is without --ntasks and with it.
    sizes = (len(places), len(requests), len(of_accounts), 5, 2, len(of_qualities))
    # First the plainest choice of each kind, then what departs from it in one way, in two ways, and so on.
    ranked = sorted(itertools.product(*map(range, sizes)), key=lambda chosen: (sum(i > 0 for i in chosen), sum(chosen)))
    # Profiles hold dicts, so they have no hash for a set.
    seen: list[Profile] = []
    for where, how, who, memory, ntasks, quality in ranked:
        (kind, partition), (form, typed) = places[where], requests[how]
        size = _size(kind, about[kind.partition])
        ways = _memory(kind, size["cpus_per_gpu"], config | about[kind.partition])
        if memory >= len(ways) or (typed and kind.gpu_type is None):
            continue
        asked = {
            **partition,
            **size,
            **of_accounts[who],
            **of_qualities[quality],
            "ntasks": bool(ntasks),
            "max_jobs": known.max_jobs,
        }
        asked |= {"gpu_request": form, "gpu_type": kind.gpu_type if typed else None}
        asked |= ways[memory] if given.keys().isdisjoint(MEMORY) else {}
        try:
            profile = Profile(**asked | given)
        except UserError:  # it contradicts what is given
            continue
        if profile not in seen:
            seen.append(profile)
            yield profile
        if len(seen) == MOST_REQUESTS:
            return


def _size(kind: Nodes, about: dict[str, str]) -> dict[str, Any]:
    """What the nodes hold, and how long a job may be there."""
    # A node without GPUs gets a process for every four cores, which is what a profile gives a GPU by default.
    count = kind.gpus or max(1, kind.cpus // 4)
    longest = minutes(about.get("MaxTime", "UNLIMITED"))
    time_min = max(1, min(USUAL_MIN, longest or USUAL_MIN))
    return {
        "gpus_per_node": count,
        "cpus_per_gpu": max(1, kind.cpus // count),
        "time_min": time_min,
        # 120 s as by default, but no more than half of the time limit.
        "signal_delay_s": min(120, 30 * time_min),
    }


def _memory(kind: Nodes, cpus: int, config: dict[str, str]) -> list[dict[str, Any]]:
    """The ways to ask for a GPU's share of a node's memory; not to mention it comes first where that is not all."""
    # Not all of it: sites keep some of a node's memory for the system, and a request for more would never start.
    share = kind.mem_mb * 95 // 100 // 1024 // max(1, kind.gpus)
    ways: list[dict[str, Any]] = [{"mem_per_gpu_gb": share}] if share and kind.gpus else []
    ways += [{"mem_per_cpu_gb": share // cpus}] if share >= cpus else []
    ways += [{"mem_gb": share * max(1, kind.gpus)}] if share else []
    ways += [{"mem_gb": 0}]
    # Without a default, Slurm gives a job that does not ask for memory all of a node's: no other fits beside it.
    limited = any(
        name.startswith("DefMemPer") and value[:1].isdigit() and value != "0" for name, value in config.items()
    )
    takes_all = "MEMORY" in config.get("SelectTypeParameters", "") and not limited
    return [*ways, {}] if takes_all else [{}, *ways]


def _with_cpu(
    place: OnSlurm, job: Job, profile: Profile, kinds: list[Nodes], accounts: list[str]
) -> tuple[Profile, list[str]]:
    """Returns the profile with what differs for jobs without GPUs, if that is found, and what there is to say of it."""
    names = list(dict.fromkeys(kind.partition for kind in sorted(kinds, key=lambda kind: kind.gpus)))
    tables: list[dict[str, Any]] = [{}, *({"partition": name} for name in names if name != profile.partition)]
    tables += [table | {"account": account} for table in tables for account in accounts if account != profile.account]
    # Not all of many: Slurm is asked about each, which takes a while.
    for table in tables[:30]:
        candidate = replace(profile, cpu=table)
        try:
            replace(place, profile=candidate, processes=1, on_gpus=False).check(job)
        except UserError:
            continue
        return candidate, []
    return profile, ["No partition was found for jobs without GPUs, such as the one that merges samples: see [cpu]."]


def _notes(kinds: list[Nodes], accounts: list[str]) -> list[str]:
    notes = [
        f"{kind.partition}: {kind.number} nodes with {kind.gpus} GPUs ({kind.gpu_type or 'no type'}), "
        f"{kind.cpus} CPUs, {kind.mem_mb // 1024} GB"
        for kind in kinds
    ]
    if accounts:
        notes.append(f"Your accounts are {', '.join(accounts)}.")
    if here := network("auto"):
        fast = here[INTERFACES[0]]
        notes.append(f'This login node has the fast network {fast}: interface = "auto" finds that of other nodes.')
    notes.append("Not known from a login node: the fast network (interface, host_suffix), modules, containers, wckeys.")
    return notes
