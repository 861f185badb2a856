"""The command line: `python launch.py COMMAND --help`. Imports no torch on the way."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, arg, subcommand

from commands.audit import Audit
from commands.doctor import Doctor
from commands.drill import Drill
from commands.evaluate import Evaluate
from commands.export import Export
from commands.report import Report
from commands.sample import Sample
from commands.sweep import Sweep
from commands.train import Resume, Train
from commands.watch import Cancel, Logs, Status, Sync
from commands.where import Launch
from diffusion.errors import OutsideError, UserError, reason
from jobs.runtime.surroundings import open_standard_streams, undisturbed
from slurm import errors as slurm_errors


def _at_home(word: str) -> str:
    """Puts the home folder in the place of a ~ that the shell has left alone, as in --runs-dir=~/runs."""
    flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(path) if path.startswith("~") else word


def main() -> int:
    """Reads the command line and runs the command; returns the exit code."""
    choice = Union[  # noqa: UP007
        Annotated[Train, subcommand("train")],
        Annotated[Sample, subcommand("sample")],
        Annotated[Evaluate, subcommand("evaluate")],
        Annotated[Export, subcommand("export")],
        Annotated[Resume, subcommand("resume")],
        Annotated[Status, subcommand("status")],
        Annotated[Logs, subcommand("logs")],
        Annotated[Cancel, subcommand("cancel")],
        Annotated[Sync, subcommand("sync")],
        Annotated[Report, subcommand("report")],
        Annotated[Doctor, subcommand("doctor")],
        Annotated[Sweep, subcommand("sweep")],
        Annotated[Drill, subcommand("drill")],
        Annotated[Audit, subcommand("audit")],
    ]
    # Without words of ours tyro looks for some in the sources of Python's own modules, which takes 40 ms.
    commands = Annotated[choice, arg(help="One of these; COMMAND --help says more.")]
    open_standard_streams()
    try:
        command: Callable[[], int] = tyro.cli(
            commands,
            prog="launch.py",
            args=[_at_home(word) for word in sys.argv[1:]],
            description="Trains and samples diffusion models, here or on a Slurm cluster, and never loses a run.",
            config=(CascadeSubcommandArgs,),
        )
        # A closed pipe ends `logs` and `status`, but must not end a job.
        with undisturbed() if isinstance(getattr(command, "where", None), Launch) else nullcontext():
            return command()
    except (UserError, slurm_errors.UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OutsideError, slurm_errors.SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still wants to flush
        return 1
    except OSError as error:  # a file that cannot be read or written
        if error.filename is None:
            try:
                os.getcwd()
            except FileNotFoundError:
                print("error: the folder that you are in has been deleted; go to another one", file=sys.stderr)
                return 2
            raise
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
