"""The ratios of the benchmarks: taken within a round, in turn, and of processes that have not failed."""

import pytest

from benchmarks.comparison import Alternative, Measurements, in_turn, limit, ratio, table


def counting(first: float) -> Measurements:
    """A measurement that is one more with each round."""
    while True:
        yield {"rate": first}
        first += 1


def failing() -> Measurements:
    yield {"rate": 1.0}
    raise RuntimeError("as the test wants it")


def test_rounds_are_paired_and_the_first_one_only_warms_up() -> None:
    found = in_turn({"a": Alternative(counting, 10), "b": Alternative(counting, 20)}, rounds=2)
    assert found == {"a": [{"rate": 11}, {"rate": 12}], "b": [{"rate": 21}, {"rate": 22}]}


def test_rounds_that_take_minutes_are_not_warmed_up() -> None:
    assert in_turn({"a": Alternative(counting, 10)}, rounds=1, warm_up=False) == {"a": [{"rate": 10}]}


def test_an_alternative_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(EOFError):
        in_turn({"a": Alternative(failing), "b": Alternative(counting, 1)}, rounds=3)


def test_a_ratio_is_that_of_each_round_not_of_the_medians() -> None:
    # The machine is half as fast in the second round, for both.
    row = ratio("training", [30.0, 15.0, 33.0], [10.0, 5.0, 12.0], "peer", at_least=3)
    assert (row.value, row.low, row.high, row.reached) == (3.0, 2.75, 3.0, True)
    assert not ratio("training", [30.0], [11.0], "peer", at_least=3).reached


def test_a_limit_is_kept_by_the_median() -> None:
    assert limit("start", "s", [0.2, 0.5, 0.3], at_most=0.3).reached
    assert "| 0.4 | 0.3 to 0.5 | <= 0.3 | **no** |" in table([limit("start", "s", [0.3, 0.5], at_most=0.3)])
