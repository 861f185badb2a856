"""Sites refuse jobs by rules of their own; `doctor --write-profile` finds a profile with which the plain commands work.

The rules are Slurm's own: job_submit/lua asks them about each job of the shared dev cluster.
"""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm import profile, site
from slurm.devcluster import DevCluster
from slurm.site import Described
from tests.launching import NO_FIGURES, TINY, Finished, done, launch
from tests.slurm.site import asks, tidied

# From 24.11 on, CPUs are among a task's resources, too.
GPUS = "local gpus = string.match((job.tres_per_node or '') .. (job.tres_per_task or ''), 'gpu.*')\n"
SITES: dict[str, tuple[str, dict[str, object]]] = {
    # What the site is like: its rules, and what its profile must say.
    "no rules": ("", {"gpu_request": "gpus-per-node", "cpu": {}}),
    "only --gres": (
        "if string.find(job.script, '--gpus') then return 'Cannot find GPU specification' end",
        {"gpu_request": "gres", "gpu_type": None},
    ),
    "the type is compulsory": (
        GPUS + "if gpus and not string.find(gpus, 'a100') then return 'specify --gres=gpu:TYPE:NUM' end",
        {"gpu_type": "a100"},
    ),
    "GPUs by task": (
        "if job.tres_per_node then return 'use --gpus-per-task' end",
        {"gpu_request": "gpus-per-task"},
    ),
    "wckeys are forbidden": ("if job.wckey then return 'no wckeys here' end", {"gpu_request": "gpus-per-node"}),
    "memory by CPU, and the number of tasks": (
        "if not job.min_mem_per_cpu then return '--mem-per-cpu is compulsory' end\n"
        "if not string.find(job.script, '--ntasks=', 1, true) then return '--ntasks is compulsory' end",
        {"ntasks": True, "mem_per_gpu_gb": None, "mem_gb": None},
    ),
    "an account is compulsory": (
        "if not job.account then return 'You must give an account' end",
        {"account": "root"},
    ),
    "jobs without GPUs go elsewhere": (
        GPUS + "if not gpus and (job.partition or 'low') == 'low' then return 'This partition is for GPUs' end",
        {"partition": "low", "cpu": {"partition": "high"}},
    ),
    "the partition is not yours to name": (
        "if job.partition then return 'The constraint decides' end",
        {"partition": None},
    ),
    "all of it": (
        GPUS + "if not job.account then return 'You must give an account' end\n"
        "if not gpus and (job.partition or 'low') == 'low' then return 'This partition is for GPUs' end\n"
        "if string.find(job.script, '--gpus') then return 'use --gres' end\n"
        "if gpus and not string.find(gpus, 'a100') then return 'which type?' end\n"
        "if job.min_mem_per_node then return '--mem is not for you' end",
        {"account": "root", "gpu_request": "gres", "gpu_type": "a100", "cpu": {"partition": "high"}},
    ),
}


class Desk:
    """A folder with a trained run, on the login node of a site."""

    def __init__(self, root: Path, cluster: DevCluster) -> None:
        self.root, self.cluster, self.profile = root, cluster, root / "site.toml"

    def launch(self, *arguments: object) -> Finished:
        """Runs a command as people type it: the profile is found without a flag. No test looks at figures."""
        default = {"DIFFUSION_PROFILE": str(self.profile) if self.profile.exists() else ""}
        return launch(*arguments, cwd=self.root, **self.cluster.env, **default, **NO_FIGURES)

    def write_profile(self, *more: object) -> list[dict[str, str]]:
        written = self.launch("doctor", "--write-profile", self.profile, "--json", *more)
        assert written.out, written
        found: list[dict[str, str]] = json.loads(written.out)
        assert [finding for finding in found if finding["level"] == "problem"] == []
        return found

    def scripts(self, folder: str) -> list[dict[str, str | None]]:
        paths = sorted((self.root / folder / "slurm").glob("*_submission.sh"))
        return [asks(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    done("train", "1d", *TINY, "--train.steps", 20, "--name", "a", "--device", "cpu", cwd=root, **NO_FIGURES)
    return root / "runs"


@pytest.fixture
def desk(cluster: DevCluster, trained: Path, tmp_path: Path) -> Iterator[Desk]:
    shutil.copytree(trained, tmp_path / "runs")
    with tidied(cluster):
        yield Desk(tmp_path, cluster)
        cluster.set_rules(None)


@pytest.mark.slurm
@pytest.mark.parametrize("name", SITES)
def test_the_plain_commands_are_accepted_with_the_profile_that_the_doctor_writes(name: str, desk: Desk) -> None:
    rules, expected = SITES[name]
    # Slurm shall take the jobs, but they need not run: to end ones that are starting takes its KillWait.
    busy = desk.cluster.submit("sleep 600", "--partition=high", "--nodes=2", "--exclusive", "--time=60")
    desk.cluster.wait_for_job(busy, "RUNNING")
    desk.cluster.set_rules(rules)
    found = desk.write_profile()
    assert any(re.search(r"would start at \d{4}-\d\d-\d\dT", finding["what"]) for finding in found)
    known: dict[str, Any] = vars(profile.read(desk.profile))
    assert {key: known[key] for key in expected} == expected
    trains = desk.launch("train", "1d", *TINY, "--train.steps", 20, "--gpus", 2, "--name", "b")
    assert trains.code == 0, trains
    samples = desk.launch("sample", "1d/a", "--num-samples", 20_000, "--gpus", 2)
    assert samples.code == 0, samples
    desk.cluster.run("scancel", "--user", "root")
    (training,) = desk.scripts("runs/1d/b")
    assert training["ntasks-per-node"] == "2"
    array, merge = sorted(desk.scripts("runs/1d/a"), key=lambda flags: "array" not in flags)
    forms = {"gpus-per-node", "gpus-per-task", "gres"}
    assert len(forms & training.keys()) == len(forms & array.keys()) == 1
    assert not forms & merge.keys()
    assert merge.get("partition") == known["cpu"].get("partition", known["partition"])


@pytest.mark.slurm
def test_a_site_where_jobs_without_gpus_go_elsewhere_to_the_end(desk: Desk) -> None:
    """The dev cluster's GPUs are pretended, so only jobs without them can run to their ends."""
    desk.cluster.set_rules(SITES["jobs without GPUs go elsewhere"][0])
    tried = desk.write_profile("--submit", "--device", "cpu", "--gpus", 2, "--slurm.cpus-per-gpu", 1)
    assert profile.read(desk.profile).cpu == {"partition": "high"}
    assert any(finding["what"].startswith("a job of 2 tasks ran on n") for finding in tried), tried
    trains = desk.launch(
        "train", "1d", *TINY, "--train.steps", 20, "--device", "cpu", "--gpus", 2, "--name", "b", "--wait"
    )
    assert trains.code == 0, trains
    samples = desk.launch("sample", "1d/b", "--num-samples", 20_000, "--device", "cpu", "--gpus", 2, "--wait")
    assert samples.code == 0, samples
    assert "20,000 samples are in" in samples.out


@pytest.mark.slurm
def test_a_site_that_limits_submissions(desk: Desk) -> None:
    counts = "local last = string.match(job.script, '%-%-array=0%-(%d+)')\n"
    desk.cluster.set_rules(counts + "if last and tonumber(last) > 2 then return 'QOSMaxSubmitJobPerUserLimit' end")
    refused = desk.launch("sample", "1d/a", "--num-samples", 200_000, "--gpus", 4)
    assert (refused.code, "QOSMaxSubmitJobPerUserLimit" in refused.err) == (2, True), refused
    assert list((desk.root / "runs" / "1d" / "a" / "samples").iterdir()) == []
    desk.cluster.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxSubmitJobs=4")
    try:
        desk.write_profile()
    finally:
        desk.cluster.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxSubmitJobs=-1")
    assert profile.read(desk.profile).max_jobs == 4
    samples = desk.launch("sample", "1d/a", "--num-samples", 200_000, "--gpus", 4)
    assert samples.code == 0, samples
    assert "an array of 3 jobs" in samples.out


def jobs(desk: Desk) -> set[str]:
    return set(desk.cluster.run("squeue", "--noheader", "--format=%A").split())


@pytest.mark.slurm
def test_no_array_is_submitted_whose_samples_could_not_be_merged(desk: Desk) -> None:
    desk.cluster.set_rules(SITES["jobs without GPUs go elsewhere"][0])
    before = jobs(desk)  # those of other tests may still be ending
    refused = desk.launch("sample", "1d/a", "--num-samples", 20_000, "--gpus", 2)
    assert (refused.code, "This partition is for GPUs" in refused.err) == (2, True), refused
    assert jobs(desk) <= before
    assert list((desk.root / "runs" / "1d" / "a" / "samples").iterdir()) == []


@pytest.mark.slurm
def test_a_site_that_takes_nothing_is_quoted_and_nothing_is_written(desk: Desk) -> None:
    desk.cluster.set_rules("return 'The cluster rests.'")
    refused = desk.launch("doctor", "--write-profile", desk.profile)
    assert refused.code == 2
    assert (
        "Slurm took no form of request. Of the plainest it said: Slurm refuses the job: The cluster rests."
        in refused.err
    )
    assert not desk.profile.exists()
    desk.profile.write_text("")
    refused = desk.launch("doctor", "--write-profile", desk.profile)
    assert (refused.code, refused.out) == (2, "")
    assert "is there already" in refused.err


def test_a_written_profile_says_what_was_found(tmp_path: Path) -> None:
    found = profile.Profile(
        account='group "a" \u00e9\U0001f600',
        gpus_per_node=2,
        mem_gb=0,
        ntasks=True,
        srun_args=("--a=b c", "\t\x7f"),
        sbatch={"nice": 0, "requeue": False},
        cpu={"partition": "cpu"},
    )
    path = tmp_path / "site.toml"
    path.write_bytes(site.content(Described(found, 1, ["Something is not known."]), "By whom."))
    assert profile.read(path) == found
    assert "qos" not in tomllib.loads(path.read_text())


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0-1),gpu:2", {"a100": 4, None: 2}),
        ("lscratch:10,gpu:nvidia_a30_2g.12gb:8(S:0,2),shard:4", {"nvidia_a30_2g.12gb": 8}),
        ("(null)", {}),
    ],
)
def test_the_gpus_of_a_node(gres: str, expected: dict[str | None, int]) -> None:
    assert site.gpus(gres) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [("7-00:00:00", 10_080), ("04:30:00", 270), ("UNLIMITED", None), ("00:00:30", 0)]
)
def test_a_time_limit(limit: str, expected: int | None) -> None:
    assert site.minutes(limit) == expected
