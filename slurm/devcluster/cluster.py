"""A real Slurm on this one machine: starts it, stops it, and does to it what happens to clusters."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from slurm.devcluster.config import RULES, Options, write_config
from slurm.devcluster.machine import (
    MARKER,
    add_hosts,
    check_folder,
    check_packages,
    check_root,
    machine_lock,
    remove_hosts,
)
from slurm.devcluster.processes import Process, cluster_processes, kill_all, send_signal, spawn, wait_for


class DevCluster:
    """slurmctld, one slurmd per node, munge and, with accounting, slurmdbd and MariaDB, all within one folder.

    `DevCluster.start(dir)` starts one and `DevCluster.find(dir)` connects to a running one; as a context manager it
    stops at the end. Slurm's commands reach it with `env` merged into their environment.
    """

    def __init__(self, dir: str | Path, options: Options) -> None:
        self.dir = Path(dir).resolve()
        self.options = options
        self.nodes = options.node_names
        # lo, because all nodes are this machine, and their names mean 127.0.0.1 (see `add_hosts`).
        self.env = {"SLURM_CONF": f"{self.dir}/slurm.conf", "GLOO_SOCKET_IFNAME": "lo"}
        self._children: list[subprocess.Popen[bytes]] = []

    @classmethod
    def start(cls, dir: str | Path, **options: Any) -> Self:
        """Starts a cluster in `dir`; the options are the fields of `Options`.

        Remains of a cluster that died with the machine are removed first. Raises Unavailable where Slurm cannot run,
        ValueError for a bad option, a folder with other things in it or a cluster that is running there already.
        """
        cluster = cls(dir, Options(**options))
        check_root()
        check_packages(cluster.options.accounting)
        check_folder(cluster.dir)
        with machine_lock():
            if cls.find(dir):
                raise ValueError(f"a cluster is running in {cluster.dir} already")
            try:
                cluster._remove()
                cluster._launch()
            except BaseException:  # Ctrl-C, too: no daemon may stay behind
                cluster._remove()
                raise
        return cluster

    @classmethod
    def find(cls, dir: str | Path) -> Self | None:
        """The cluster whose controller answers in `dir`, if there is one."""
        marker = Path(dir) / MARKER
        if not marker.exists() or not shutil.which("scontrol"):
            return None
        cluster = cls(dir, Options(**json.loads(marker.read_text())))
        return cluster if cluster._controller_answers() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kills the cluster's processes, its jobs' included, and removes all that it made on this machine."""
        check_root()
        with machine_lock():
            self._remove()

    def kill_node(self, name: str) -> None:
        """SIGKILLs the node's slurmd. The steps of its jobs live on, as on a node that only lost its network.

        Slurm marks the node DOWN and requeues its jobs 20 to 40 seconds later.
        """
        slurmds = [process for process in cluster_processes(self.dir, name) if process.name == "slurmd"]
        if not slurmds:
            raise ValueError(f"the node must be running; got {name}")
        send_signal(slurmds, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Starts the node as after a reboot (what old jobs left there ends) and waits until it can take jobs."""
        # With old steps alive, slurmctld would end them and start the requeued job at once, and slurmd refuse the job:
        # "Job credential revoked". That fails the job for good, and happens on no node that takes a minute to boot.
        kill_all(self.dir, name)
        before = self.node(name)["SlurmdStartTime"]

        def registered() -> bool:
            node = self.node(name)
            return node["SlurmdStartTime"] != before and node["State"] in ("IDLE", "MIXED", "ALLOCATED")

        self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name, ready=registered)

    def restart_controller(self) -> None:
        """Ends slurmctld in good order, as an upgrade does, and starts it again."""
        with self.without_controller():
            pass

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """Keeps slurmctld away while entered."""

        def controllers() -> list[Process]:
            return [p for p in cluster_processes(self.dir) if p.name == "slurmctld"]

        send_signal(controllers(), signal.SIGTERM)
        wait_for(lambda: not controllers(), "the end of slurmctld")
        try:
            yield
        finally:
            self._start("slurmctld", "slurmctld", "-D", ready=self._controller_answers)

    def set_rules(self, lua: str | None) -> None:
        """Refuses jobs from now on as the body of a Lua function of `job` says, which returns why; None takes all."""
        rules = self.dir / RULES
        if lua is None:
            rules.unlink(missing_ok=True)
        else:
            made = rules.with_suffix(".tmp")
            made.write_text(f"return function(job, partitions, user)\n{lua}\nend\n")
            made.rename(rules)  # whole, since the controller may be reading it

    def run(self, *command: str, input: str | None = None) -> str:
        """Runs a command, such as squeue, against this cluster and returns what it prints; RuntimeError if it fails."""
        done = self._done(*command, input=input)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}".strip())
        return done.stdout

    def submit(self, script: str, *flags: str) -> str:
        """Submits a batch script to bash and returns the job's id; its output is dropped unless flags say otherwise."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *flags, input=f"#!/bin/bash\n{script}\n").strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The job's fields as `scontrol show job` names them (JobState, Restarts, ...), up to the first space."""
        return _fields(self.run("scontrol", "--oneliner", "show", "job", job_id))

    def node(self, name: str) -> dict[str, str]:
        """The node's fields as `scontrol show node` names them (State, AllocTRES, ...), up to the first space."""
        return _fields(self.run("scontrol", "--oneliner", "show", "node", name))

    def wait_for_job(self, job_id: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states (PENDING, RUNNING, COMPLETED, ...) and returns its fields."""

        def job_in_state() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in states else None

        return wait_for(job_in_state, f"job {job_id} {' or '.join(states)}", timeout_s)

    def wait_for_node(self, name: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Waits until the node's state begins with one of the given (IDLE, DOWN, ...) and returns its fields.

        A node on which a job is still ending (IDLE+COMPLETING) is not idle yet.
        """

        def node_in_state() -> dict[str, str] | None:
            node = self.node(name)
            reached = node["State"].startswith(states) and node["State"] != "IDLE+COMPLETING"
            return node if reached else None

        return wait_for(node_in_state, f"node {name} {' or '.join(states)}", timeout_s)

    def _launch(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        # First of all, since only a folder with this file is ever deleted.
        (self.dir / MARKER).write_text(json.dumps(asdict(self.options)))
        write_config(self.dir, self.options)
        add_hosts(self.dir, self.nodes)
        self._start_munge()
        if self.options.accounting:
            self._start_accounting()
        self._start("slurmctld", "slurmctld", "-D", ready=self._controller_answers)
        for name in self.nodes:
            self.start_node(name)

    def _start_munge(self) -> None:
        files = [f"--{kind}-file={self.dir}/munge.{kind}" for kind in ("key", "pid", "seed")]
        socket = self.dir / "munge.socket"
        # Forced, for munged is wary of root and of folders that not everyone may enter, such as a test's.
        self._start("munged", "munged", "--foreground", "--force", f"--socket={socket}", *files, ready=socket.exists)

    def _start_accounting(self) -> None:
        # --no-defaults has to come first; it keeps out the settings of a MariaDB that this machine may have already.
        data = ["--no-defaults", "--user=root", f"--datadir={self.dir}/mysql", "--innodb-log-file-size=8M"]
        self.run("mariadb-install-db", *data, "--skip-test-db", "--auth-root-authentication-method=normal")
        socket = self.dir / "mysql" / "socket"
        flags = [f"--socket={socket}", "--skip-networking", f"--pid-file={self.dir}/mysql/pid"]
        # slurmdbd makes the database itself, once a connection to it has failed; but the client library of MariaDB 11.8
        # then allows that connection no columns: "_check_mysql_concat_is_sane: null result".
        flags += [f"--init-file={self.dir}/init.sql"]
        self._start("mariadbd", "mariadbd", *data, *flags, ready=socket.exists)
        self._start("slurmdbd", "slurmdbd", "-D", ready=self._accounting_answers)

    def _start(self, name: str, *command: str, ready: Callable[[], bool]) -> None:
        """Starts a daemon and waits until it is ready; otherwise RuntimeError with the end of its log."""
        # Few variables, so that the cluster is the same whoever starts it.
        env = {"PATH": os.environ["PATH"], "MYSQL_UNIX_PORT": f"{self.dir}/mysql/socket", **self.env}
        log = self.dir / "log" / f"{name}.out"
        child = spawn(list(command), env, log)
        self._children.append(child)

        try:
            wait_for(lambda: child.poll() is not None or ready(), f"the start of {name}")
        except TimeoutError as error:
            raise RuntimeError(f"{error}: {log.read_text()[-500:].strip()}") from error
        if child.returncode is not None:
            raise RuntimeError(f"{name} ended with {child.returncode}: {log.read_text()[-500:].strip()}")

    def _controller_answers(self) -> bool:
        return " is UP" in self._done("scontrol", "ping").stdout

    def _accounting_answers(self) -> bool:
        return bool(self._done("sacctmgr", "--noheader", "show", "qos").stdout)

    def _done(self, *command: str, input: str | None = None) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, input=input, capture_output=True, text=True, check=False)

    def _remove(self) -> None:
        kill_all(self.dir)
        for child in self._children:
            child.wait()
        self._children.clear()
        remove_hosts(self.dir)
        if (self.dir / MARKER).exists():
            shutil.rmtree(self.dir)


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"([\w:/]+)=(\S*)", line))
