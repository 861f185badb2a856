"""The command line: `python launch.py COMMAND --help`. Imports no torch on the way."""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, arg, subcommand

from diffusion.errors import OutsideError, UserError, reason
from jobs.runtime.surroundings import open_standard_streams, undisturbed
from slurm import errors as slurm_errors

COMMANDS = {
    "train": ("train.Train", "Trains a model; with the name of a run that exists, continues it."),
    "sample": ("sample.Sample", "Draws samples of a trained model; run again, draws what is missing."),
    "evaluate": (
        "evaluate.Evaluate",
        "Measures samples of a run against the exact answer or real data; with a second run, compares the two.",
    ),
    "export": (
        "export.Export",
        "Makes a folder to publish: weights, a card with picture and numbers, a program that draws samples.",
    ),
    "resume": ("train.Resume", "Continues a run, also a failed one, on other GPUs if asked."),
    "status": ("watch.Status", "Shows all runs, one of them in detail, or a sweep's runs by their loss."),
    "logs": ("watch.Logs", "Shows what a run has printed."),
    "cancel": ("watch.Cancel", "Ends a run, with a last checkpoint; `resume` continues it."),
    "sync": (
        "watch.Sync",
        "Sends what was tracked offline to wandb, from a machine with a network; knows what it has sent.",
    ),
    "report": (
        "report.Report",
        "Writes one HTML page about a run, or about several and how they compare; it needs no network.",
    ),
    "doctor": (
        "doctor.Doctor",
        "Examines this machine or cluster before a job is lost to it: what is wrong, why it matters, what helps.",
    ),
    "sweep": (
        "sweep.Sweep",
        "Trains a grid of settings, each point a run of its own; run again, trains what is not finished.",
    ),
    "drill": (
        "drill.Drill",
        "Trains twice, once stopped again and again, and shows that the results are equal byte for byte.",
    ),
    "audit": (
        "audit.Audit",
        "Computes a run, or steps of it, again, and says whether it gets the same bytes; the run may be running.",
    ),
}
"""The file and class of each command, and the first sentence of its help, so that `--help` imports no command."""


@dataclass(frozen=True)
class _Other:
    """Stands for a command that was not asked for."""


def _choice(words: list[str]) -> Any:
    """The commands for tyro. Only the one that was asked for is imported, because all together take 100 ms."""
    asked = words[0] if words else "--help"
    # With a word that is no command, tyro looks for what was meant among the flags of all of them.
    wanted = {asked} if asked in COMMANDS else set() if asked in ("-h", "--help") else set(COMMANDS)
    commands = tuple(_named(name, import_it=name in wanted) for name in COMMANDS)
    # Without words of ours tyro looks for some in the sources of Python's own modules, which takes 40 ms.
    return Annotated[Union[commands], arg(help="One of these; COMMAND --help says more.")]  # noqa: UP007


def _named(name: str, *, import_it: bool) -> Any:
    place, sentence = COMMANDS[name]
    if not import_it:
        return Annotated[_Other, subcommand(name, description=sentence)]
    module, _, kind = place.partition(".")
    return Annotated[getattr(import_module(f"commands.{module}"), kind), subcommand(name)]


def _registry(words: list[str]) -> Any:
    """How tyro reads what it would read otherwise; --help needs nothing of it, and imports no command."""
    if not words or words[0] in ("-h", "--help"):
        return None
    return import_module("commands.arguments").CHOICES


def _flowing(helptext: str) -> str:
    """The paragraphs of a docstring without its line breaks."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in helptext.split("\n\n"))


def _starts_a_job(command: object) -> bool:
    if not hasattr(command, "where"):
        return False
    from commands.where import Start  # which this command has imported already

    return isinstance(command.where, Start)


def _at_home(word: str) -> str:
    """Puts the home folder in the place of a ~ that the shell has left alone, as in --runs-dir=~/runs."""
    flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(path) if path.startswith("~") else word


def _of_another_user(error: PermissionError) -> str | None:
    from jobs.storage.run_folder import not_yours  # here, because --help needs nothing of it

    return not_yours(error)


def main() -> int:
    """Reads the command line and runs the command; returns the exit code."""
    words = [_at_home(word) for word in sys.argv[1:]]
    open_standard_streams()
    try:
        # Before tyro, which would only say that it knows no such flag; it takes _ for - in flags, so this does, too.
        if any(word.replace("_", "-").startswith("--train.micro-batch-size") for word in words):
            raise UserError("--train.micro-batch-size is gone: --train.grad-shards N computes the batch in N parts")
        if any(word.replace("_", "-").startswith("--train.no-cuda-graph") for word in words):
            raise UserError("--train.no-cuda-graph is --train.cuda-graph never now")
        if words and words[0] in COMMANDS:
            import_module("commands.arguments").refuse_second(words)
        if words and words[0] in ("train", "resume", "sweep"):
            import_module("commands.train").refuse_flags(words[0], words)
        if {"-h", "--help"} & set(words):
            # tyro's own keeps line breaks before a line that is indented, as those of docstrings are.
            tyro._strings.remove_single_line_breaks = _flowing
        command: Callable[[], int] = tyro.cli(
            _choice(words),
            prog="launch.py",
            args=words,
            description="Trains and samples diffusion models, here or on a Slurm cluster, and never loses a run.",
            # So that options of `train` may also follow the name of the experiment.
            config=(CascadeSubcommandArgs,),
            registry=_registry(words),
        )
        # A closed pipe ends `logs` and `status`, but must not end a job.
        with undisturbed() if _starts_a_job(command) else nullcontext():
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
        # os.getcwd in a deleted folder names no file; any other such error is unexpected: its traceback helps.
        if error.filename is None:
            try:
                os.getcwd()
            except FileNotFoundError:
                print("error: the folder that you are in has been deleted; go to another one", file=sys.stderr)
                return 2
            raise
        whose = _of_another_user(error) if isinstance(error, PermissionError) else None
        print(f"error: {whose or reason(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    atexit.register(gc.freeze)  # else Python would look for garbage in all of torch at its end, for half a second
    sys.exit(main())
