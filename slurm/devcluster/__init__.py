"""A real Slurm on one Debian or Ubuntu machine, to rehearse a cluster job and to test against."""

from slurm.devcluster.cluster import DevCluster
from slurm.devcluster.config import Options
from slurm.devcluster.machine import APT_PACKAGES, Unavailable
from slurm.devcluster.processes import wait_for

__all__ = ["APT_PACKAGES", "DevCluster", "Options", "Unavailable", "wait_for"]
