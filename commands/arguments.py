"""Arguments that commands have in common, also those that start no job."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from diffusion.errors import UserError
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

ONE_RUN = ("sample", "resume", "status", "logs", "cancel", "audit")
"""The commands that take one RUN and no other word without a flag."""


def refuse_second(words: Sequence[str]) -> None:
    """Raises UserError where two words follow a command that takes one; tyro would call the second an option."""
    if len(words) < 3 or words[1].startswith("-") or words[2].startswith("-"):
        return
    command, first, second = words[:3]
    if command in ONE_RUN:
        raise UserError(f"{command} takes one RUN, such as EXPERIMENT/NAME; got {first} and {second}")
    if command == "train":
        raise UserError(f"train takes the name of a run by --name {second}; got {first} and {second}")


CHOICES = ConstructorRegistry()
"""How tyro reads --train.compile and --train.cuda-graph: they were flags, so they may stand alone; and numbers."""

NUMBERS: dict[Any, tuple[str, str]] = {int: ("INT", "a whole number"), float: ("FLOAT", "a number")}
"""How the help and errors call them."""


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


@CHOICES.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A number, or a word in its place. Where it is neither, tyro would show the errors that Python raises for it."""
    members = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    kind = next((member for member in members if member in NUMBERS), None)
    words: dict[str, Any] = {}
    for member in members:
        if member is NoneType:
            words["None"] = None
        elif get_origin(member) is Literal:
            words |= {word: word for word in get_args(member)}
        elif isinstance(member, type) and issubclass(member, Enum):
            words |= {word.name: word for word in member}
        elif member is not kind:
            return None
    if kind is None:
        return None
    metavar, called = NUMBERS[kind]

    def read(given: list[str]) -> Any:
        try:
            return words[given[0]] if given[0] in words else kind(given[0])
        except ValueError:
            raise ValueError(f"it must be {' or '.join([called, *words])}; got {given[0]}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([*(f"{{{word}}}" for word in words), metavar]),
        instance_from_str=read,
        is_instance=lambda value: value in words.values() or isinstance(value, int | kind),
        str_from_instance=lambda value: [str(value)],
    )
