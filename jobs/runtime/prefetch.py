"""Computes what the next step needs while this step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function of the step; a thread computes its value for the next step.

    The function must not compute with torch: a second thread brings OpenMP threads of its own, there are more of them
    than cores, and waiting for each other doubles the time of a step on a CPU.
    """

    def __init__(self, function: Callable[[int], T]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._begun: tuple[int, Future[T]] | None = None

    def begin(self, step: int) -> None:
        """Starts to compute the value of `step` in the thread."""
        self._begun = step, self._thread.submit(self._function, step)

    def of(self, step: int) -> T:
        """Returns the value of `step`, whether it has been begun or not; raises what the function raises."""
        if self._begun is not None and self._begun[0] == step:
            return self._begun[1].result()
        return self._function(step)
