"""A mirror on this machine, for the tests that fetch data."""

from collections.abc import Iterator

import pytest

from tests.jobs.mirror import Mirror


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as mirror:
        yield mirror
