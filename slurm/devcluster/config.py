"""The dev cluster's options, and the configuration files that follow from them."""

import os
import random
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Whoever asks the kernel for any port, as the processes of a job do to meet, gets one from 32768 on; submitit names one
# from 20000 on. Keep out of both.
PORT_RANGE = range(10_000, 20_000)
DATABASE = "slurm_acct_db"
CPUS_PER_NODE = 4
"""This may be more than the machine has."""
GRACE_TIME_S = 30
"""Seconds from the preemption signal to SIGTERM and the kill."""
RULES = "rules.lua"
"""A file that returns a function of a job (Slurm's job_desc), which returns why the job is refused, or nil."""
JOB_SUBMIT = """\
function slurm_job_submit(job, partitions, user)
   local rules = loadfile("{rules}")
   local refusal = rules and rules()(job, partitions, user)
   if refusal then
      slurm.log_user(refusal)
      return slurm.ERROR
   end
   return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
   return slurm.SUCCESS
end

return slurm.SUCCESS
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the cluster looks like; every field is also a flag of `python -m slurm.devcluster up`."""

    nodes: Annotated[int, "compute nodes: one slurmd each, all on this machine"] = 2
    gpus_per_node: Annotated[int, "pretended GPUs per node; CUDA_VISIBLE_DEVICES is set for each job"] = 4
    accounting: Annotated[bool, "run slurmdbd and MariaDB, so that sacct answers"] = True
    user_signal: Annotated[bool, "preemption sends the signal of sbatch --signal; otherwise SIGTERM alone"] = True
    job_requeue: Annotated[bool, "batch jobs may be requeued unless they say otherwise (JobRequeue)"] = True
    max_array_size: Annotated[int, "array indices end before this (MaxArraySize)"] = 1001
    gpu_type: Annotated[str, "type of the GPUs, such as a100; none by default"] = ""
    job_submit: Annotated[
        bool, "ask rules.lua in the cluster's folder about each job, as sites do (job_submit/lua)"
    ] = False
    node_prefix: Annotated[str, "nodes are called n1, n2, ...; change it where those names are taken"] = "n"

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "max_array_size": 2}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}; got {getattr(self, name)}")
        if not re.fullmatch("[a-z0-9]*", self.gpu_type):
            raise ValueError(f"gpu_type must be lower-case letters and digits; got {self.gpu_type!r}")
        if not re.fullmatch("[a-z]+", self.node_prefix):
            raise ValueError(f"node_prefix must be lower-case letters; got {self.node_prefix!r}")

    @property
    def node_names(self) -> list[str]:
        return [f"{self.node_prefix}{i}" for i in range(1, self.nodes + 1)]


def write_config(dir: Path, options: Options) -> None:
    """Writes all configuration files, the munge key and the GPUs' device files into `dir`."""
    for name in ("log", "state", "spool", "gpu"):
        (dir / name).mkdir()
    for i in range(options.gpus_per_node):
        # Slurm only looks at the file's type: a second /dev/null will do for a GPU.
        os.mknod(dir / "gpu" / f"gpu{i}", 0o020666, os.makedev(1, 3))
    ports = free_ports(options.nodes + 2)
    _write(dir / "munge.key", os.urandom(128))
    _write(dir / "init.sql", f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n".encode())
    _write(dir / "slurmdbd.conf", render_slurmdbd_conf(dir, ports[1]).encode())
    _write(dir / "slurm.conf", render_slurm_conf(dir, options, ports).encode(), mode=0o644)
    if options.job_submit:
        _write(dir / "job_submit.lua", JOB_SUBMIT.format(rules=dir / RULES).encode())
    _write(dir / "gres.conf", render_gres_conf(dir, options).encode(), mode=0o644)


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    # The mode before the content, so that nobody reads a key in between; touch alone obeys the umask.
    path.touch(mode)
    path.chmod(mode)
    path.write_bytes(content)


def free_ports(count: int) -> list[int]:
    """Finds ports on which nothing on this machine listens."""
    free: list[int] = []
    # A random order: the port of a node that another cluster has just lost looks free, too.
    for port in random.sample(PORT_RANGE, len(PORT_RANGE)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop}")


def render_slurm_conf(dir: Path, options: Options, ports: list[int]) -> str:
    """Writes slurm.conf for ports = [slurmctld, slurmdbd, slurmd of each node ...]."""
    host = socket.gethostname().split(".")[0]
    ctld_port, dbd_port, *node_ports = ports
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    gres = f" Gres=gpu:{kind}{options.gpus_per_node}" if options.gpus_per_node else ""
    lines = [
        "ClusterName=devcluster",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ctld_port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        # A requeued job waits until its old credential has expired: by default two minutes.
        f"AuthInfo=socket={dir}/munge.socket,cred_expire=5",
        f"StateSaveLocation={dir}/state",
        f"SlurmdSpoolDir={dir}/spool/%n",
        f"SlurmctldPidFile={dir}/slurmctld.pid",
        f"SlurmdPidFile={dir}/slurmd-%n.pid",
        f"SlurmctldLogFile={dir}/log/slurmctld.log",
        f"SlurmdLogFile={dir}/log/slurmd-%n.log",
        # submitit makes MASTER_PORT of the job's id: for programs that use it, clusters side by side share no ids.
        f"FirstJobId={(ctld_port - PORT_RANGE.start) * 1000 + 1}",
        # Both without cgroups, which a container often may not change.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",  # nodes may have more CPUs and memory than this machine
        "GresTypes=gpu",
        "ReturnToService=2",  # a node that comes back is used at once
        "KillWait=5",
        "SlurmdTimeout=20",  # a lost node is noticed soon; by default after five minutes
        "InactiveLimit=30",
        "OverTimeLimit=0",
        # Jobs start about a second after they may, not half a minute.
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0",
        f"MaxArraySize={options.max_array_size}",
        f"JobRequeue={int(options.job_requeue)}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
    ]
    if options.user_signal:
        lines += ["SlurmctldParameters=preempt_send_user_signal"]
    if options.job_submit:
        lines += ["JobSubmitPlugins=lua"]
    if options.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={dbd_port}",
            f"AccountingStoragePass={dir}/munge.socket",
            "JobAcctGatherType=jobacct_gather/linux",
        ]
    # Memory is not handed out (CR_CPU); the figure only lets a request meant for a large node pass.
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS_PER_NODE} RealMemory=1000000{gres}"
    lines += [f"NodeName={name} {node} Port={port}" for name, port in zip(options.node_names, node_ports, strict=True)]
    lines += [
        f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_TIME_S}",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def render_gres_conf(dir: Path, options: Options) -> str:
    """Writes gres.conf, because a plain count would schedule GPUs, but not set CUDA_VISIBLE_DEVICES."""
    if not options.gpus_per_node:
        return ""
    names = ",".join(options.node_names)
    kind = f" Type={options.gpu_type}" if options.gpu_type else ""
    return f"NodeName={names} Name=gpu{kind} File={dir}/gpu/gpu[0-{options.gpus_per_node - 1}]\n"


def render_slurmdbd_conf(dir: Path, port: int) -> str:
    """Writes slurmdbd.conf; the environment gives the database's socket (MYSQL_UNIX_PORT)."""
    lines = [
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={port}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={dir}/munge.socket",
        f"LogFile={dir}/log/slurmdbd.log",
        f"PidFile={dir}/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        f"StorageLoc={DATABASE}",
    ]
    return "\n".join(lines) + "\n"
