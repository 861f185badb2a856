"""Arguments that commands have in common, also those that start no job."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


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

SWITCHES = ConstructorRegistry()
"""How tyro reads settings that are on, off, or left to the program."""
SWITCH_POSITIONS = "{auto,always,never}"
_POSITIONS = {"auto": None, "always": True, "never": False, "True": True, "False": False}


@SWITCHES.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | None] | None:
    if info.type != bool | None:
        return None

    def read(words: list[str]) -> bool | None:
        if words and words[0] not in _POSITIONS:
            raise ValueError("it must be auto, always or never")
        return _POSITIONS[words[0]] if words else True  # the flag alone

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{SWITCH_POSITIONS}]",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [next(word for word, position in _POSITIONS.items() if position is value)],
    )
