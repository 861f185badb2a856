"""The drill tells the truth: equal where it is equal, different where a byte differs."""

import signal
from pathlib import Path

import pytest

from jobs.doctor.drill import differences
from jobs.storage import ownership
from jobs.storage.run_folder import RunFolder
from tests.launching import NO_FIGURES, done, interrupt, start, wait_until


def test_a_drill_finds_equal_results_and_would_see_a_changed_byte(tmp_path: Path) -> None:
    where = ("--cluster", "local", "--device", "cpu", "--gpus", "2")  # in turn two processes and one
    ended = done("drill", "--steps", "240", "--kills", "4", *where, cwd=tmp_path, **NO_FIGURES)
    assert "Equal byte for byte" in ended.out
    for name in ("SIGKILL", "SIGTERM", "SIGUSR2", "SIGINT"):
        assert name in ended.out
    (folder,) = (tmp_path / "runs" / "drill").iterdir()
    whole, killed = (RunFolder(folder / "1d" / name) for name in ("whole", "killed"))
    # Each of the four has stopped the training, or says that it came too late: then it may have stopped what follows.
    assert max(1, 4 - ended.out.count("came too late")) <= killed.read_status()["restarts"] <= 4
    assert differences(whole, killed) == []
    path = killed.checkpoints / "step-00000240" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert differences(whole, killed) == ["checkpoints/step-00000240/ema.safetensors"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_ends_the_drill_ends_its_trainings_as_well(number: signal.Signals, code: int, tmp_path: Path) -> None:
    drill = start("drill", "--steps", "1000000", "--cluster", "local", "--device", "cpu", cwd=tmp_path, **NO_FIGURES)
    wait_until(lambda: list(tmp_path.glob("runs/drill/*/1d/whole/metrics.jsonl")))
    drill.send_signal(number)
    assert interrupt(drill, number).code == code  # whoever insists ends nothing sooner
    (path,) = tmp_path.glob("runs/drill/*/1d/whole")
    assert not ownership.is_locked(path)
    assert RunFolder(path).state() == "cancelled"
