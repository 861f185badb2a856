"""Arguments that commands have in common, also those that start no job."""

from pathlib import Path
from typing import Annotated, Any, get_args

from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jobs.experiments.settings import Choice


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

CHOICES = ConstructorRegistry()
"""How tyro reads --train.compile and --train.cuda-graph: they were flags, so they may stand alone."""


@CHOICES.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    kind: Any = Choice
    if info.type != kind:
        return None
    words = get_args(kind)

    def read(given: list[str]) -> str:
        if given and given[0] not in words:
            raise ValueError("it must be auto, always or never")
        return given[0] if given else "always"

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join(words)}}}]",
        instance_from_str=read,
        is_instance=lambda value: value in words,
        str_from_instance=lambda value: [value],
    )
