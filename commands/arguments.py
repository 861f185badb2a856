"""Arguments that commands have in common, also those that start no job."""

from typing import Annotated, Any

from tyro.conf import Positional, arg


def optional(metavar: str, default: str) -> Any:
    """Lets the help show an option whose default is None with what None stands for."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


Run = Annotated[
    Positional[str],
    arg(metavar="RUN", help="A run folder, EXPERIMENT/NAME, or EXPERIMENT for its last created run."),
]
