"""python -m slurm.devcluster up|down|status|packages: the dev cluster's command line."""

import argparse
import os
import shlex
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from slurm.devcluster import APT_PACKAGES, DevCluster, Options, Unavailable

# Not in a home folder: sudo changes HOME, and other users must be able to reach munge's socket.
DEFAULT_DIR = "/var/lib/diffusion-devcluster"


def main() -> int:
    arguments = parser().parse_args()
    # A plain kill of `up` must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Other users than root submit jobs, too, and have to reach the socket and slurm.conf.
    os.umask(0o022)
    try:
        code: int = arguments.run(arguments)
        return code
    except (Unavailable, ValueError) as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The flags of `up` are the fields of `Options`."""
    result = argparse.ArgumentParser(prog="python -m slurm.devcluster", description=__doc__)
    commands = result.add_subparsers(required=True, metavar="up|down|status|packages")
    for run in (up, down, status, packages):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if run is not packages:
            command.add_argument("--dir", type=Path, default=DEFAULT_DIR, help="all that it needs (%(default)s)")
        if run is up:
            add_options(command)
    return result


def add_options(command: argparse.ArgumentParser) -> None:
    hints = get_type_hints(Options, include_extras=True)
    for field in fields(Options):
        kind, text = get_args(hints[field.name])
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            command.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            command.add_argument(flag, type=kind, default=field.default, help=f"{text} (%(default)s)")


def up(arguments: argparse.Namespace) -> int:
    """Start a cluster and print the line that makes sbatch, squeue and sacct of your shell use it."""
    cluster = DevCluster.find(arguments.dir)
    if cluster:
        print(f"devcluster: already running in {cluster.dir}; nothing changed", file=sys.stderr)
    else:
        options = {field.name: getattr(arguments, field.name) for field in fields(Options)}
        cluster = DevCluster.start(arguments.dir, **options)
    print(export_line(cluster))
    return 0


def down(arguments: argparse.Namespace) -> int:
    """Stop the cluster and remove all that it made."""
    DevCluster(arguments.dir, Options()).stop()
    print(f"devcluster: nothing is left of {arguments.dir}", file=sys.stderr)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Show the nodes and the jobs; exit code 1 if no cluster is running."""
    cluster = DevCluster.find(arguments.dir)
    if not cluster:
        print(f"devcluster: not running in {arguments.dir}", file=sys.stderr)
        return 1
    print(cluster.run("sinfo") + cluster.run("squeue") + export_line(cluster))
    return 0


def packages(_: argparse.Namespace) -> int:
    """Print the Debian packages that the cluster needs."""
    print(" ".join(APT_PACKAGES))
    return 0


def export_line(cluster: DevCluster) -> str:
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in cluster.env.items())


if __name__ == "__main__":
    sys.exit(main())
