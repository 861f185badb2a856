"""The command `doctor`: examines this machine or cluster, and prints what it finds."""

import contextlib
import json
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from commands.arguments import AMONG_OPTIONS, optional
from commands.where import SlurmSilent, Where, given
from diffusion.errors import UserError
from diffusion.problems.mnist import MnistProblem
from jobs.storage import provenance, run_folder
from jobs.storage.run_folder import RunFolder
from slurm import queue
from slurm.errors import SlurmError
from slurm.place import OnSlurm

if TYPE_CHECKING:
    from jobs.doctor.machine import Finding
    from jobs.doctor.trial_job import DoctorJob
    from slurm.doctor import Finding as SlurmFinding


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examines this machine or cluster before a job is lost to it: what is wrong, why it matters, what helps."""

    submit: bool = False
    """Submit a short job with the --gpus asked for, which tries out GPUs, network and the folder of runs."""
    write_profile: Annotated[str | None, optional("NAME", "none")] = None
    """Write a profile of this cluster into slurm/profiles, or to a path that ends in .toml: what it says of itself, and
    the plainest form of request that it takes. What is given with --slurm.FIELD is kept."""
    json: bool = False
    """Print JSON, for scripts."""
    where: Annotated[Where, AMONG_OPTIONS] = field(default_factory=Where)

    def __call__(self) -> int:
        findings = []
        for finding in self._examine():
            findings.append(finding)
            if not self.json:
                _show_finding(*finding)
        if self.json:
            print(json.dumps([finding._asdict() for finding in findings], indent=2))
        return 1 if any(finding.level == "problem" for finding in findings) else 0

    def _examine(self) -> "Iterator[Finding | SlurmFinding]":
        # Here, because all other commands start without them.
        from jobs.doctor import machine
        from jobs.doctor.trial_job import DoctorJob
        from slurm import doctor as slurm_doctor
        from slurm import site

        try:
            on_slurm = self.where.on_slurm()
        except SlurmSilent:
            if self.submit or self.where.cluster == "slurm":
                raise
            yield slurm_doctor.silent()
            return
        if self.submit and not on_slurm:
            raise UserError("--submit needs a Slurm that answers; there is none here")
        if self.write_profile is not None and not on_slurm:
            raise UserError("--write-profile needs a Slurm that answers; there is none here")
        path = None if self.write_profile is None else site.profile_path(self.write_profile)
        run = RunFolder(self.where.runs_dir / f".doctor-{run_folder.new_name(self.where.runs_dir)}")
        place = self.where.place(run)
        job = DoctorJob(run.path, self.where.processes, "cpu" if self.where.device == "cpu" else "cuda")
        yield from machine.examine(self.where.runs_dir, Path(MnistProblem().root), is_shared=on_slurm)
        if not isinstance(place, OnSlurm):
            # Jobs run here anyway, so a Slurm that does not answer is no finding; but it is not absent, either.
            with contextlib.suppress(SlurmError):
                if not queue.has_slurm():
                    yield slurm_doctor.absent()
            return
        if path is not None:
            found = site.describe(place, job, given(self.where.slurm))
            place = replace(place, profile=found.profile)
            command = f"`doctor --write-profile {self.write_profile}` on {platform.node()}"
            about = f"Written by {command}. docs/slurm.md says what else a profile may say."
            content = site.content(found, about)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            yield from slurm_doctor.written(found, path)
        yield from slurm_doctor.examine(place, job)
        if self.submit:
            run.path.mkdir(parents=True)
            provenance.save_code(run.code)
            _submit_and_wait(place, job)
            tried = list(job.findings())
            yield from tried
            if not any(finding.level == "problem" for finding in tried):
                shutil.rmtree(run.path)


def _submit_and_wait(place: OnSlurm, job: "DoctorJob") -> None:
    """Runs a job of a few minutes to its end; Ctrl-C cancels it."""
    # The profile's delay may be longer than so short a time limit, which a profile refuses.
    profile = replace(place.profile, time_min=min(10, place.profile.time_min), signal_delay_s=30)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed for scripts is JSON alone
        job_id = replace(place, profile=profile).run(job)
    try:
        place.wait(lambda: [job_id], lambda: False if job.is_over() else None)
    except KeyboardInterrupt:
        queue.cancel([job_id])
        raise


def _show_finding(level: str, what: str, why: str, cure: str) -> None:
    width = shutil.get_terminal_size().columns
    for label, text in ((level, what), ("  why", why), ("  cure", cure)):
        if text:
            print(textwrap.fill(f"{label:<9}{text}", width, subsequent_indent=" " * 9, break_on_hyphens=False))
    sys.stdout.flush()
