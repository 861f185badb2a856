"""Values computed ahead are those of the step that asks, whoever asked before."""

import threading

import pytest

from jobs.runtime.prefetch import Prefetch


def test_the_value_is_that_of_the_step_begun_or_not() -> None:
    computed_in: list[tuple[int, int]] = []

    def square(step: int) -> int:
        computed_in.append((step, threading.get_ident()))
        return step**2

    prefetch = Prefetch(square)
    assert prefetch.of(3) == 9
    prefetch.begin(4)
    assert prefetch.of(4) == 16
    prefetch.begin(5)
    assert prefetch.of(7) == 49  # as after a checkpoint is restored
    assert prefetch.of(5) == 25
    here = threading.get_ident()
    assert [(step, thread == here) for step, thread in sorted(computed_in)] == [
        (3, True),
        (4, False),
        (5, False),
        (7, True),
    ]


def test_a_failure_in_the_thread_reaches_who_asks() -> None:
    prefetch = Prefetch(lambda step: 1 / step)
    prefetch.begin(0)
    with pytest.raises(ZeroDivisionError):
        prefetch.of(0)
