"""What the next step needs, computed while this one is worked on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function of the step, whose next value a thread computes.

    The function must not compute with torch: a second thread's OpenMP threads come on top of the first one's, and then
    both wait for each other passively, which doubles the time of a step on a CPU.
    """

    def __init__(self, function: Callable[[int], T]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._begun: tuple[int, Future[T]] | None = None

    def begin(self, step: int) -> None:
        """Computes the value of `step` in the thread."""
        self._begun = step, self._thread.submit(self._function, step)

    def of(self, step: int) -> T:
        """The value of `step`, begun or not; raises what the function raises."""
        if self._begun is not None and self._begun[0] == step:
            return self._begun[1].result()
        return self._function(step)
