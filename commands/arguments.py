"""Arguments that commands have in common, also those that start no job."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg


def optional(metavar: str, default: str) -> Any:
    """Lets the help show an option whose default is None with what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


AMONG_OPTIONS = arg(name="", help="")
"""Marks a field whose own fields are options of the command. Without `help`, here and where a group has words of its
own, tyro looks for them in the sources of all classes above, in each start of a command."""

RunsDir = Annotated[Path, arg(help="Folder of all runs.")]
Run = Annotated[
    Positional[str],
    arg(metavar="RUN", help="A run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run."),
]
