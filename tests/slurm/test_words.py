"""What Slurm says is understood in the words of an old and a new version, with a site's own notices around them.

The answers were recorded by record.py; the job ids are in its order.
"""

import json
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from jobs.experiments.experiment_json import write
from jobs.experiments.table import EXPERIMENTS
from slurm import after, allocation, doctor, queue, task
from slurm.errors import SlurmError, UserError
from slurm.place import OnSlurm
from slurm.profile import Profile
from slurm.submit import Shape, Submission
from slurm.task import SlurmTask
from tests.disturbances import fill_up, small_disk
from tests.launching import ROOT, done, launch, sentence
from tests.slurm.record import RECORDED
from tests.slurm.works import Lost, Talkative
from tests.warm import searched_first

DONE, FAILED, TASK_KILLED, SHELL_KILLED, CANCELLED, ARRAY, RUNNING, WAITING = map(str, range(1, 9))
ALL = [DONE, FAILED, TASK_KILLED, SHELL_KILLED, CANCELLED, ARRAY, RUNNING, WAITING]
VERSIONS = ["22.05.8", "24.11.5"]
NOTICE = """
*** On Tuesday the cluster rests: job 1 and all others will wait. ***
CLUSTER: west
7 jobs are yours
 | scratch | is | 98 | % full |
your job 3 has priority = 12, of MaxArraySize
1|RUNNING|and|so|on|
Since May Requeue=0, Restarts=7, State=DOWN, PartitionName=old and JobState=COMPLETING mean nothing here.
Everything is UP
caf\u00e9
"""


class Tools:
    """Slurm's commands, which print what a real Slurm has printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = f"{folder}:/usr/bin:/bin"
        folder.mkdir()

    def write(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)

    def notice(self) -> str:
        """A file with a site's notice; its last letter is no UTF-8."""
        path = self.folder / "notice"
        path.write_bytes(NOTICE.encode("latin-1"))
        return shlex.quote(str(path))

    def replay(self, version: str, notice: bool, forgotten: bool = False) -> None:
        """All commands as that version answers; squeue knows no job if they are `forgotten`."""
        around = self.notice() if notice else ""

        def show(name: str) -> str:
            return f"cat {around} {shlex.quote(str(RECORDED / version / name))}.txt {around}"

        active = show("squeue-active")
        self.write("squeue", f"case $* in *exit_code*) {show('squeue')};; *) {active};; esac")
        if forgotten:
            self.write("squeue", f"cat {around} /dev/null")
        self.write("sacct", show("sacct"))
        self.write("sinfo", show("sinfo"))
        answers = {"ping": "echo 'Slurmctld(primary) at here is UP'"}
        answers |= {kind: show(f"scontrol-{kind}") for kind in ("config", "partition", "job")}
        self.write("scontrol", f"case $* in {' '.join(f'*{kind}*) {show};;' for kind, show in answers.items())} esac")
        self.write("sbatch", f"cat > /dev/null; {show('sbatch')}")
        self.write("srun", "exit 1")  # submitit only looks whether it is there


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    tools = Tools(tmp_path / "tools")
    monkeypatch.setenv("PATH", tools.path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tools


either = pytest.mark.parametrize("version", VERSIONS)
quiet_or_not = pytest.mark.parametrize("notice", [False, True], ids=["bare", "with notices"])


@either
@quiet_or_not
def test_squeue(version: str, notice: bool, tools: Tools) -> None:
    tools.replay(version, notice)
    tools.write("sacct", "exit 1")
    found = queue.look(ALL)
    assert found == {
        DONE: queue.JobState("COMPLETED", nodes="n1"),
        FAILED: queue.JobState("FAILED", nodes="n1"),
        TASK_KILLED: queue.JobState("FAILED", nodes="n1", signal="SIGKILL"),
        SHELL_KILLED: queue.JobState("FAILED", nodes="n1", signal="SIGKILL"),
        CANCELLED: queue.JobState("CANCELLED", nodes="n2", signal="SIGTERM"),
        f"{ARRAY}_0": queue.JobState("COMPLETED", nodes="n2"),
        f"{ARRAY}_1": queue.JobState("FAILED", nodes="n2"),
        RUNNING: queue.JobState("RUNNING", nodes="n[1-2]"),
        f"{WAITING}_3": queue.JobState("PENDING", "Resources"),
        f"{WAITING}_4": queue.JobState("PENDING", "Resources"),
    }
    assert queue.active(ALL) == {RUNNING: "RUNNING", f"{WAITING}_3": "PENDING", f"{WAITING}_4": "PENDING"}


@either
@quiet_or_not
def test_sacct(version: str, notice: bool, tools: Tools) -> None:
    tools.replay(version, notice, forgotten=True)
    found = queue.look(ALL)
    assert {job_id: (job.state, job.signal) for job_id, job in found.items()} == {
        DONE: ("COMPLETED", ""),
        FAILED: ("FAILED", ""),
        TASK_KILLED: ("FAILED", "SIGKILL"),
        SHELL_KILLED: ("FAILED", "SIGKILL"),
        CANCELLED: ("CANCELLED", "SIGTERM"),
        f"{ARRAY}_0": ("COMPLETED", ""),
        f"{ARRAY}_1": ("FAILED", ""),
    }
    assert queue.active(ALL) == {}


@either
@quiet_or_not
def test_scontrol_and_sinfo(version: str, notice: bool, tools: Tools, tmp_path: Path) -> None:
    tools.replay(version, notice)
    assert queue.has_slurm()
    assert queue.max_array_size() == 1001
    job = task._fields("job", RUNNING)
    assert (job["JobState"], job["Restarts"], job["PreemptTime"], job["Requeue"]) == ("RUNNING", "0", "None", "1")
    profile = Profile(gpus_per_node=4, cpus_per_gpu=1)
    place = OnSlurm(4, profile, on_gpus=True, name="a", folder=tmp_path, code=tmp_path)
    found = {finding.what: finding.level for finding in doctor.examine(place, job=None)}  # type: ignore[arg-type]
    assert found.pop("KillWait=5: a cancelled job has 5 s to save") == "warning"
    assert set(found.values()) == {"ok"}, found
    assert f"Slurm {version}" in found
    assert "GPUs of a node in low: 4, asked for 4" in found
    assert "nodes of low that are up: 2, asked for 1" in found


OF_25_11 = (
    "JobId=7 JobName=a JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "PreemptTime=None Partition=low ExcNodeList=n2 NumNodes=2 Command=/a.sh SubmitLine=sbatch "
    "--export=ALL,Restarts=7,Requeue=0,JobState=FAILED --exclude=n9 ExcNodeList=n9 /a.sh WorkDir=/ ExpeditedRequeue=Yes"
)
"""As src/scontrol/info_job.c of 25.11 and 26.05 writes it: they repeat the command that has submitted the job."""


def test_what_newer_versions_say_otherwise(tools: Tools, tmp_path: Path) -> None:
    """Made after Slurm's source, since no packages of these versions are at hand."""
    tools.replay("24.11.5", notice=False)
    squeue = "echo '1|EXPEDITING|None|0:0|n1'; echo '2|PENDING|TopologyNoSwitch|0:0|'; echo '3|REQUEUE_HOLD|held|0:0|'"
    tools.write("squeue", squeue)
    tools.write("sacct", "echo '4|FAILED|137:0|n1'; echo '4.batch|FAILED|137:0|n1'")  # 9:0 before 25.11
    found = queue.look(["1", "2", "3", "4"])
    assert {job_id: (job.phase, job.reason) for job_id, job in found.items()} == {
        "1": ("waiting", ""),
        "2": ("waiting", "TopologyNoSwitch"),
        "3": ("waiting", "held"),
        "4": ("ended", ""),
    }
    assert found["4"].signal == "SIGKILL"
    tools.write("scontrol", f"echo '{OF_25_11}'")
    job = task._fields("job", "7")
    names = ("JobState", "Restarts", "Requeue", "ExcNodeList", "NumNodes")
    assert [job[name] for name in names] == ["RUNNING", "2", "1", "n2", "2"]
    tools.write("scontrol", "echo 'Job 12_23 not found' >&2; exit 1")  # on stdout before 26.05
    assert task._fields("job", "12_23") == {}
    parameters = {"JobRequeue": "1", "SlurmctldParameters": "cloud_dns,enable_expedited_requeue"}
    assert "not expedited" in doctor._requeue(parameters).what
    asked = Submission("a", [print], Profile(), 1, True, tmp_path, tmp_path).script()  # type: ignore[list-item]
    assert "#SBATCH --requeue\n" in asked  # 26.05 refuses a value that it does not know
    assert "--gres" not in asked  # which 26.05 refuses beside --gpus-per-node


def test_ten_minutes_of_waiting_are_few_questions() -> None:
    time = [0.0]
    pace = queue.Pace(clock=lambda: time[0])

    def asked(seconds: int, lives: bool | None, about: object = "17") -> list[int]:
        """The seconds, from now on, at which Slurm is asked by somebody who looks every second."""
        begin = time[0]
        for time[0] in (begin + second for second in range(seconds)):
            if pace.is_due(lives, about):
                yes.append(int(time[0] - begin))
        time[0] += 1
        return [yes.pop(0) for _ in range(len(yes))]

    yes: list[int] = []
    waiting = asked(600, None)
    assert waiting[:6] == [0, 2, 6, 14, 30, 62]
    assert len(waiting) < 15 and waiting[-1] > 540
    assert asked(10_000, True) == []  # it beats
    assert asked(20, False) == [0, 2, 6, 14]  # it has ended, Slurm may not know yet
    assert asked(100, True) == []  # it is back
    assert asked(10, False) == [0, 2, 6]
    assert asked(10, False, about="18") == [0, 2, 6]  # queued again under another id
    assert queue.Pace(300, clock=lambda: time[0]).is_due(True)  # nothing is known before the first question


PING = "sleep {}; echo 'Slurmctld(primary) at here is UP'"
UNCONFIGURED = "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1"
DOWN = "echo 'Slurmctld(primary) at here is DOWN'; exit 1"
DRY = ("train", "1d", "--dry-run", "--device", "cpu")


@pytest.mark.parametrize("scontrol", [PING.format(4), DOWN], ids=["slow", "down"])
def test_a_silent_controller_never_means_the_login_node(scontrol: str, tools: Tools, tmp_path: Path) -> None:
    tools.replay("24.11.5", notice=False)
    tools.write("scontrol", scontrol)
    refused = launch(*DRY, cwd=tmp_path, PATH=tools.path)
    assert refused.code == 2 and refused.out == ""
    assert all(words in sentence(refused.err) for words in ("--cluster slurm waits 30 s", "--cluster local"))
    assert "Would run on this machine" in launch(*DRY, "--cluster", "local", cwd=tmp_path, PATH=tools.path).out
    insisting = launch(*DRY, "--cluster", "slurm", cwd=tmp_path, PATH=tools.path)
    assert insisting.code == (2 if scontrol == DOWN else 0)
    assert ("#SBATCH" in insisting.out) == (scontrol != DOWN)
    (finding,) = json.loads(launch("doctor", "--json", cwd=tmp_path, PATH=tools.path).out)
    assert finding["level"] == "problem" and "--cluster local" in finding["why"]


def test_packages_that_nobody_has_set_up_are_no_cluster(tools: Tools, tmp_path: Path) -> None:
    tools.write("sbatch", "exit 1")
    tools.write("scontrol", UNCONFIGURED)
    assert "Would run on this machine" in launch(*DRY, cwd=tmp_path, PATH=tools.path).out
    assert launch(*DRY, cwd=tmp_path, PATH=tools.path, SLURM_CONF="/nowhere/slurm.conf").code == 2
    assert launch(*DRY, "--cluster", "slurm", cwd=tmp_path, PATH=tools.path).code == 2


@either
@quiet_or_not
def test_the_allocation_around_a_command(
    version: str, notice: bool, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.replay(version, notice)
    assert allocation.around_us() is None
    monkeypatch.setenv("SLURM_JOB_ID", RUNNING)
    around = allocation.around_us()
    assert around is not None
    assert (around.nodes, around.tasks, around.gpus_per_node) == (2, 2, 0)
    assert around.step(1, on_gpus=False) is None
    step = around.step(2, on_gpus=False)
    assert step is not None and step.shape == Shape(2, 1)
    with pytest.raises(UserError, match="at most 2 in this allocation of 2 nodes, 1 on each; got 3"):
        around.step(3, on_gpus=False)


@pytest.mark.parametrize(
    ("record", "gpus"),
    [
        (" TRES=cpu=8,node=2,billing=8,gres/gpu=8,gres/gpu:a100=8 ", 4),
        (" AllocTRES=cpu=8,node=2,gres/gpu=2 TresPerNode=gres/gpu:1 ", 1),
        (" TRES=cpu=8,node=2 TresPerNode=gres:gpu:4 ", 4),
        (" TresPerNode=gres:gpu:a100:3 ", 3),
        (" TresPerNode=gres/scratch:100,gres/gpu:v100:2 ", 2),
        (" TRES=cpu=8,node=2 ", 0),
    ],
)
def test_gpus_of_an_allocation_in_the_words_of_slurm(record: str, gpus: int) -> None:
    assert allocation._gpus_per_node(record, 2) == gpus


@pytest.mark.parametrize("shown", ["sbatch", "sbatch-parsable"])
@either
def test_sbatch(version: str, shown: str) -> None:
    answer = (RECORDED / version / f"{shown}.txt").read_text()
    expected = {"sbatch": "9", "sbatch-parsable": "10"}[shown]
    assert queue.submitted_id(answer) == expected
    assert queue.submitted_id(NOTICE + answer + NOTICE) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [("17;west\n", "17"), ("Submitted batch job 17 on cluster west\n", "17"), (NOTICE, None), ("", None)],
)
def test_sbatch_of_several_clusters_and_of_none(shown: str, expected: str | None) -> None:
    assert queue.submitted_id(shown) == expected


@either
def test_a_submission_among_notices(version: str, tools: Tools, tmp_path: Path) -> None:
    tools.replay(version, notice=True)
    submission = Submission("a", [print], Profile(), 1, False, tmp_path / "slurm", tmp_path)  # type: ignore[list-item]
    assert submission.submit() == "9"
    assert (tmp_path / "slurm" / "9_submitted.pkl").exists()


def test_nothing_is_submitted_from_a_full_disk_and_nothing_left_there(tools: Tools, tmp_path: Path) -> None:
    tools.write("sbatch", "echo 9")
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        fill_up(disk / "filler")
        submission = Submission("a", [print], Profile(), 1, False, disk / "slurm", tmp_path)  # type: ignore[list-item]
        with pytest.raises(UserError, match=f"no job can be submitted from {disk}/slurm: No space left on device"):
            submission.submit()
        assert list((disk / "slurm").iterdir()) == []


def test_a_refusal_among_notices(tools: Tools, tmp_path: Path) -> None:
    refusal = "sbatch: error: Batch job submission failed: Invalid account"
    asked = "--cpus-per-task=4 --mem=8GB --nodes=1 --ntasks-per-node=1 --partition=gpu --time=60"
    tools.write("sbatch", f"(cat {tools.notice()}; echo {refusal}; echo See you.) >&2; exit 1")
    profile = Profile(partition="gpu", mem_gb=8)
    submission = Submission("a", [print], profile, 1, False, tmp_path / "slurm", tmp_path)  # type: ignore[list-item]
    with pytest.raises(UserError, match=f"Slurm refuses the job: {refusal}. It was asked for: (.*)$") as refused:
        submission.check()
    assert set(asked.split()) <= set(str(refused.value).partition("asked for: ")[2].split())
    assert "--output" not in str(refused.value)
    with pytest.raises(SlurmError, match=r"Invalid account\. It was asked for: .*--partition=gpu"):
        submission.submit()
    tools.write("sbatch", "exit 1")
    with pytest.raises(UserError, match="Slurm refuses the job: no answer"):
        submission.check()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--slurm.partition", "None"), None),
        (("--slurm.account", "a\udcff"), "which has no '\\udcff'"),  # a byte that is no text
    ],
)
def test_a_profile_is_written_whole_or_not_at_all(
    flags: tuple[str, ...], said: str | None, tools: Tools, tmp_path: Path
) -> None:
    tools.replay("24.11.5", notice=False)
    tools.write("sinfo", "echo 'low|4|1000000|gpu:4|2'")
    tools.write("sacctmgr", "exit 1")
    path = tmp_path / "new" / "site.toml"
    ended = launch("doctor", "--write-profile", path, *flags, cwd=tmp_path, PATH=tools.path)
    if said is None:
        assert tomllib.loads(path.read_text())["partition"], ended
    else:
        assert (ended.code, said in sentence(ended.err)) == (2, True), ended
        assert not path.parent.exists()


@either
def test_a_job_that_submits_itself_again_among_notices(
    version: str, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.replay(version, notice=True)
    tools.write("sbatch", f"cat {tools.notice()} {RECORDED}/{version}/sbatch-parsable.txt {tools.notice()}")
    (tools.folder / "scontrol").unlink()
    (tools.folder / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tools.folder))  # the real scontrol is hidden, too
    monkeypatch.setenv("SLURM_JOB_ID", RUNNING)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    for name in ("submission.sh", "submitted.pkl"):
        (tmp_path / f"{RUNNING}_{name}").write_text(name)
    assert task.requeue() == "10"
    assert (tmp_path / "10_submission.sh").read_text() == "submission.sh"
    assert (tmp_path / "10_submitted.pkl").read_text() == "submitted.pkl"


def test_a_job_on_several_nodes_of_an_allocation_is_not_tried_again(tools: Tools, tmp_path: Path) -> None:
    """Nobody could tell whether it has been taken over: its first process may be on another node than the launcher."""
    tools.replay("24.11.5", notice=False)
    refused = launch(*DRY, "--gpus", 2, "--retries", 1, cwd=tmp_path, PATH=tools.path, SLURM_JOB_ID=RUNNING)
    assert refused.code == 2 and refused.out == ""
    assert "--cluster slurm submits a job of its own, which is tried again" in sentence(refused.err)
    done(*DRY, "--gpus", 2, "--retries", 0, cwd=tmp_path, PATH=tools.path, SLURM_JOB_ID=RUNNING)


AWAY_TWICE = """
cd "$(dirname "$0")"; echo "$*" >> asked
[ $(grep -c -- "$*" asked) -gt 2 ] || { echo 'slurm_load_jobs error: {words}' >&2; exit 1; }
case $* in
  *requeue*) echo JobId=7 JobState=PENDING Restarts=1 > job;;
  *config*) echo SLURM_VERSION = 24.05; echo PreemptType = preempt/partition_prio;;
  *partition*) echo PartitionName=low PreemptMode=REQUEUE; echo n1; echo n2;;
  *update*) ;;
  *) cat job;;
esac
"""


@pytest.mark.parametrize(
    "words",
    ["Unable to contact slurm controller (connect failure)", "Socket timed out on send/recv operation"],
)
def test_a_job_waits_for_a_controller_that_is_away(
    words: str, tools: Tools, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("scontrol", "sinfo"):
        tools.write(name, AWAY_TWICE.replace("{words}", words))
    job, asked = tools.folder / "job", tools.folder / "asked"
    job.write_text("JobId=7 JobState=RUNNING Restarts=0\n")
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", 600.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert task.is_current()
    assert task.requeue(["n2"]) == "7"
    # When it asks about the job, requeues it, asks for the other nodes, and leaves one out.
    assert capfd.readouterr().err.count(f"{words}; asking again") == 4
    assert asked.read_text().count("update JobId=7 ExcNodeList=n2\n") == 3
    job.write_text("JobId=7 JobState=RUNNING Restarts=1\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    task.stay_away()
    assert asked.read_text().count("update JobId=7 Requeue=0\n") == 3
    job.write_text("JobId=7 JobState=RUNNING Restarts=1 PreemptTime=2025-01-01T00:00:00 Requeue=1 Partition=low\n")
    asked.unlink()
    assert task.requeue() == "7"
    assert "requeue" not in asked.read_text()  # Slurm does it, as its configuration says
    job.write_text("JobId=7 JobState=RUNNING Restarts=2\n")
    assert task.requeue() == "7"
    assert "requeue" not in asked.read_text()  # Slurm has started it elsewhere: that one must not be stopped


ANSWERS = """
cd "$(dirname "$0")"; echo "$*" >> asked
[ $(wc -l < asked) -le {answers} ] || { echo 'scontrol: error: Unable to contact slurm controller' >&2; exit 1; }
echo JobId=7 JobState=RUNNING Restarts=0
"""


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_job_asks_its_script_to_queue_it_again_where_the_controller_does_not_answer(
    answers: int, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer says neither that the job comes back nor that it may not. The script can wait for longer."""
    tools.write("scontrol", ANSWERS.replace("{answers}", str(answers)))
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    requeue = task.Requeue(60.0)
    assert (requeue(), requeue.came_back, task.wish().exists()) == ("7", True, True)
    assert task.is_current()  # as far as anybody knows
    with pytest.raises(queue.Unanswered):
        task.requeue()


@pytest.mark.parametrize("wished", [True, False])
def test_a_script_that_is_not_answered_says_that_the_job_has_failed(
    wished: bool, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.write("scontrol", "echo 'scontrol: error: Unable to contact slurm controller' >&2; exit 1")
    DelayedSubmission(SlurmTask(Lost(tmp_path / "said"), 60.0)).dump(tmp_path / "7_submitted.pkl")  # type: ignore[arg-type]
    environment = {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if wished:
        task.wish().touch()
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", queue.PATIENCE_S)  # so that it is restored
    monkeypatch.setattr(after, "PATIENCE_S", 0.2)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["after", str(tmp_path), "1", "0"])
    assert after.main() == 1
    assert (tmp_path / "said").read_text() == ("the job could not be queued again" if wished else "None")


def test_an_element_of_an_array_submits_itself_alone(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a node that has failed, as long as Slurm has others; beside those that the site leaves out."""
    away = f"[ -s {tmp_path}/asked ] || words='Unable to contact slurm controller'"  # at first
    refuses = 'case "$*" in *--exclude=n9,n1*) echo "$words" >&2; exit 1;; esac'
    tools.write("sbatch", f'{away}; echo "$@" >> {tmp_path}/asked; {refuses}; echo 20')
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", 600.0)
    monkeypatch.setenv("PATH", str(tools.folder))
    for name, value in {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    script = tmp_path / "17_submission.sh"
    script.write_text("#!/bin/bash\n#SBATCH --array=0-5\n#SBATCH --exclude=n9\n")
    (tmp_path / "17_3_submitted.pkl").write_text("pickle")
    assert task.requeue(["n1"]) == "20_3"
    alone = "--parsable --dependency=afterany:17_3 --array=3"
    with_and_without = [*2 * [f"{alone} --exclude=n9,n1 {script}"], f"{alone} {script}"]
    assert (tmp_path / "asked").read_text().splitlines() == with_and_without
    assert (tmp_path / "20_submission.sh").read_text() == script.read_text()
    assert (tmp_path / "20_3_submitted.pkl").read_text() == "pickle"


OTHERS = """7094002_[2-3]|(null)|(null)
7094003|afterany:7094001(unfulfilled)|/a b/7094001_submission.sh
7094004_[3]|afterany:7094002_3(unfulfilled)|/a b/7094002_submission.sh
7094005|afterany:7094002_*(unfulfilled)|/a b/.mark.sh
"""
"""What squeue 22.05.8 has said of jobs that wait: two are submitted again, one follows an array."""


@pytest.mark.parametrize(
    ("job_id", "squeue", "expected", "times"),
    [
        ("7094001", OTHERS, "7094003", 1),
        ("7094002_3", OTHERS, "7094004_3", 1),
        ("709400", OTHERS, "20", 2),
        ("7094002", OTHERS, "20", 2),
        ("7094001", None, None, 1),
    ],
    ids=["here", "element", "not here", "followed", "nobody tells"],
)
def test_a_job_is_submitted_once_if_the_answer_does_not_come(
    job_id: str,
    squeue: str | None,
    expected: str | None,
    times: int,
    tools: Tools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The controller may have taken it, which squeue tells, where there is one."""
    asked = tmp_path / "asked"
    silent = f"[ -s {asked} ] || {{ echo 'Socket timed out on send/recv operation' >&2; echo x >> {asked}; exit 1; }}"
    tools.write("sbatch", f"{silent}; echo x >> {asked}; echo 20")
    if squeue is not None:
        tools.write("squeue", f"[ ! -s {asked} ] || echo {shlex.quote(squeue)}")
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setenv("PATH", str(tools.folder))
    array, _, index = job_id.partition("_")
    own = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index} if index else {"SLURM_JOB_ID": array}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    (tmp_path / f"{array}_submission.sh").write_text("#!/bin/bash\n")
    (tmp_path / f"{job_id}_submitted.pkl").write_text("pickle")
    assert task.requeue(["n1"]) == expected
    assert asked.read_text() == "x\n" * times
    assert expected is None or (tmp_path / f"{expected}_submitted.pkl").exists()


def test_a_job_that_was_submitted_is_not_submitted_by_its_script_as_well(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task has heard nothing; its script asks before it submits, and submits nothing if nobody answers."""
    tools.write("sbatch", f"touch {tmp_path}/submitted; echo 20")
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", 0.0)
    monkeypatch.setenv("PATH", str(tools.folder))
    monkeypatch.setenv("SLURM_JOB_ID", "7094001")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    for name in ("submission.sh", "submitted.pkl"):
        (tmp_path / f"7094001_{name}").write_text("x")
    tools.write("squeue", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(queue.Unanswered, match="squeue: "):
        task.requeue()
    tools.write("squeue", f"echo {shlex.quote(OTHERS)}")
    assert task.requeue() == "7094003"
    assert (tmp_path / "7094003_submitted.pkl").exists()
    assert not (tmp_path / "submitted").exists()


def test_a_job_that_never_hears_whether_it_was_submitted_leaves_that_to_its_script(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.write("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    tools.write("squeue", "")  # nothing waits
    monkeypatch.setattr(queue, "AGAIN_S", 0.0)
    monkeypatch.setattr(queue, "PATIENCE_S", 0.0)
    monkeypatch.setenv("PATH", str(tools.folder))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    (tmp_path / "17_submission.sh").write_text("#!/bin/bash\n")
    with pytest.raises(queue.Unanswered, match="Socket timed out"):
        task.requeue()
    assert [path.name for path in tmp_path.glob("*submi*")] == ["17_submission.sh"]


@either
@quiet_or_not
def test_status_logs_and_cancel(version: str, notice: bool, tools: Tools, tmp_path: Path) -> None:
    tools.replay(version, notice)
    expected = {RUNNING: "running", TASK_KILLED: "failed", CANCELLED: "cancelled", f"{WAITING}_3": "requeued"}
    for job_id in expected:
        run = tmp_path / "runs" / "1d" / f"job-{job_id}"
        (run / "slurm").mkdir(parents=True)
        (run / "experiment.json").write_text(write("1d", EXPERIMENTS["1d"].preset))
        (run / "launch.json").write_text(json.dumps({"job_ids": [job_id], "host": "elsewhere"}))
        said = {"state": "running", "step": 7, "total": 9, "updated": "2026-01-01T00:00:00.000+00:00"}
        (run / "status.json").write_text(json.dumps(said))
        (run / "slurm" / f"{job_id}_0_log.out").write_text("Hello\n")
    environment = {"PATH": tools.path}
    shown = launch("status", "--json", cwd=tmp_path, **environment)
    assert (shown.code, shown.err) == (0, "")
    states = {entry["run"]: entry["state"] for entry in json.loads(shown.out)}
    assert states == {f"1d/job-{job_id}": state for job_id, state in expected.items()}
    followed = launch("logs", f"1d/job-{TASK_KILLED}", "--follow", cwd=tmp_path, **environment)
    assert (followed.code, followed.out) == (0, "Hello\n"), followed
    ended = launch("cancel", f"1d/job-{TASK_KILLED}", cwd=tmp_path, **environment)
    assert (ended.code, ended.err) == (2, f"error: runs/1d/job-{TASK_KILLED} is not running: it is failed\n")


def test_what_people_set_for_their_eyes_does_not_count(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.write("squeue", f'[ -z "$SQUEUE_PARTITION" ] && cat {RECORDED}/24.11.5/squeue-active.txt')
    monkeypatch.setenv("SQUEUE_PARTITION", "mine")
    assert queue.active([RUNNING]) == {RUNNING: "RUNNING"}


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("srun: error: n1: task 1: Killed\nsrun: error: n2: task 2: Exited with exit code 1\n", ("Killed", "n1")),
        (
            "slurmstepd: error: Detected 1 oom_kill event\nsrun: error: c-17: tasks 0-3: Out Of Memory\n",
            ("Out", "c-17"),
        ),
        ("loss 0.3\nsrun: error: n2: task 2: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n", (None, "n2")),
        ("srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n", (None, None)),
    ],
)
def test_which_task_died_first(log: str, expected: tuple[str | None, str | None]) -> None:
    cause, node = after.first_end(log)
    assert node == expected[1]
    assert cause is None if expected[0] is None else expected[0] in str(cause)


@dataclass(frozen=True)
class Ending:
    """A job whose tasks have died; done or not, it does not come back."""

    done: bool
    retries: int = 3

    def comes_back_as(self, job_id: str) -> None:
        raise AssertionError(job_id)

    def is_done(self, cause: str | None) -> bool:
        return self.done

    def try_again_after(self, *arguments: object) -> bool:
        assert not self.done
        return False


@pytest.mark.parametrize(("done", "code"), [(True, 0), (False, 137)])
def test_the_script_of_a_job_that_is_done_ends_well_however_its_tasks_have_ended(
    done: bool, code: int, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.write("scontrol", "echo JobId=7 JobState=RUNNING Restarts=0")
    DelayedSubmission(SlurmTask(Ending(done), 60.0)).dump(tmp_path / "7_submitted.pkl")  # type: ignore[arg-type]
    for name, value in {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(queue, "PATIENCE_S", queue.PATIENCE_S)  # so that it is restored
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["after", str(tmp_path), "137", "0"])
    assert after.main() == code


@pytest.mark.processes
def test_the_script_decides_though_its_log_is_on_a_full_disk(tools: Tools, tmp_path: Path) -> None:
    tools.write("scontrol", "echo JobId=7 JobState=RUNNING Restarts=0")
    decided = tmp_path / "decided"
    DelayedSubmission(SlurmTask(Talkative(decided), 60.0)).dump(tmp_path / "7_submitted.pkl")  # type: ignore[arg-type]
    env = {"PATH": tools.path, "PYTHONPATH": searched_first(ROOT), "SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}
    with small_disk(tmp_path / "disk", megabytes=1) as disk, (disk / "log").open("wb", buffering=0) as log:
        with suppress(OSError):
            while True:
                log.write(b"x" * 4096)
        command = [sys.executable, "-m", "slurm.after", tmp_path, "137", "0"]
        ended = subprocess.run(command, env=env, stdout=log, stderr=log, check=False)
    assert (ended.returncode, decided.exists()) == (137, True)
