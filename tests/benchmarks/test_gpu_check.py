"""The check of a GPU: one part's failure is told and stops no other, and what there is has been written."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.comparison import limit
from benchmarks.gpu_check import Check, Part, parts


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, "cpu", time.monotonic() + 300)


def outcomes(check: Check) -> dict[str, str]:
    """As the file of numbers tells them."""
    found = json.loads((check.folder / "gpu-check.json").read_text())["parts"]
    return {name: part["outcome"] for name, part in found.items()}


@pytest.mark.processes
def test_a_part_that_fails_and_one_that_takes_too_long_stop_no_other(check: Check) -> None:
    check.run(Part("broken", ("no_such_module",), 60))
    check.run(Part("endless", ("http.server", "0"), 1))
    check.run(Part("good", ("platform",), 60))
    assert outcomes(check) == {
        "broken": "failed with exit code 1: see broken.txt",
        "endless": "cut off after 1 s: see endless.txt",
        "good": "passed",
    }
    assert [part["passed"] for part in check.found.values()] == [False, False, True]
    assert "no_such_module" in (check.folder / "broken.txt").read_text()
    assert "| good | passed |" in (check.folder / "gpu-check.md").read_text()


@pytest.mark.processes
def test_a_part_that_was_cut_off_leaves_what_it_had_measured(check: Check) -> None:
    rows = [limit("speed", "s", [1.0], None).as_json(), limit("distance", "", [3.0], 2).as_json()]
    (check.folder / "endless.json").write_text(json.dumps({"rows": rows}))
    check.run(Part("endless", ("http.server", "0"), 1))
    table = (check.folder / "gpu-check.md").read_text()
    assert "| speed | 1 s |" in table and "**no**" in table


@pytest.mark.processes
def test_a_missed_target_is_a_failure(check: Check) -> None:
    (check.folder / "good.json").write_text(json.dumps({"rows": [limit("distance", "", [3.0], 2).as_json()]}))
    check.run(Part("good", ("platform",), 60))
    assert outcomes(check) == {"good": "missed a target: distance"}
    assert not check.found["good"]["passed"]


def test_nothing_is_begun_when_the_time_for_all_is_over(tmp_path: Path) -> None:
    check = Check(tmp_path, "cpu", time.monotonic())
    check.run(Part("good", ("platform",), 60))
    assert outcomes(check) == {"good": "not run: the time for all parts was over"}


def test_every_test_marked_gpu_and_every_benchmark_of_a_gpu_is_a_part(tmp_path: Path) -> None:
    side_by_side, alone = parts("cuda", tmp_path)
    files = {path.stem for path in (Path(__file__).parent.parent / "gpu").glob("test_*.py")}
    assert {part.name for part in side_by_side} == {"survival", *files}
    assert {part.name for part in alone} == {"kernels", "training", "sampling"}
