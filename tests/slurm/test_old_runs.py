"""An old run is sampled, evaluated and continued on Slurm, where a job is a pickle of today's classes."""

import json

import numpy as np
import pytest

from tests.launching import NO_FIGURES, status
from tests.old_runs import ARCHIVES, unpack
from tests.slurm.site import Site

pytestmark = pytest.mark.slurm
CPU = ("--device", "cpu", "--cluster", "slurm", "--slurm.cpus-per-gpu", "1", "--wait")


def test_a_run_of_an_earlier_version(site: Site) -> None:
    run = unpack(ARCHIVES[0], "1d", site.root / "runs", site.root)
    copied = {path.relative_to(run): path.read_bytes() for path in (run / "code").rglob("*.py")}

    drawing = ("--num-samples", 160, "--name", "before", "--sampler", "ddim", "--steps", "5")
    drawn = site.launch("sample", run, *drawing, *CPU, **NO_FIGURES)
    assert drawn.code == 0, drawn
    assert "The code has changed since this run began" in drawn.out
    assert len(np.load(run / "samples" / "before" / "samples.npz")["arr_0"]) == 160

    evaluated = site.launch("evaluate", run, "--samples", "before", "--json", *CPU, **NO_FIGURES)
    assert evaluated.code == 0, evaluated
    assert json.loads(evaluated.out)["metrics"]

    continued = site.launch("resume", run, *CPU, **NO_FIGURES)
    assert continued.code == 0, (continued, site.log(run))
    assert status(run)["state"] == "finished"
    # One copy of today's code for all of them, beside the first one, which a job that still waits may need.
    assert len([path for path in run.iterdir() if path.name.startswith("code-")]) == 1
    assert copied == {path.relative_to(run): path.read_bytes() for path in (run / "code").rglob("*.py")}
