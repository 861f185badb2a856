"""`python -m tests.slurm.record` records what this machine's Slurm says of jobs of all kinds, for test_words.py.

The job ids are replaced by 1, 2, ... in the order of submission, so that recordings of all versions say the same.
"""

import re
import tempfile
from pathlib import Path

from slurm.devcluster import DevCluster, wait_for

RECORDED = Path(__file__).parent / "recorded"
LOOK = "--Format=JobArrayID:40|,State:20|,Reason:80|,exit_code:12|,NodeList:400"
COMMANDS = {
    "squeue": ("squeue", "--me", "--states=all", "--array", "--noheader", LOOK),
    "squeue-active": ("squeue", "--me", "--noheader", "--array", "--format=%i|%T"),
    "sacct": ("sacct", "--noheader", "--parsable2", "--format=JobID,State,ExitCode,NodeList"),
    "scontrol-config": ("scontrol", "show", "config"),
    "scontrol-partition": ("scontrol", "--oneliner", "show", "partition"),
    "sinfo": ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%c|%m|%G|%t"),
}
KEPT = r"MaxArraySize|MaxBatchRequeue|Preempt|SLURM_VERSION|JobRequeue|KillWait|SlurmctldParameters|Accounting\w+Type"
"""Of the configuration: the rest would tell of the machine."""


def submit_all(cluster: DevCluster) -> list[str]:
    """Jobs of all kinds, in the order that test_words.py expects; returns their ids."""
    done = cluster.submit("true")
    failed = cluster.submit("exit 3")
    task_killed = cluster.submit("srun bash -c 'kill -9 $$'")
    shell_killed = cluster.submit("kill -9 $$")
    cancelled = cluster.submit("sleep 100")
    array = cluster.submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    cluster.wait_for_job(cancelled, "RUNNING")
    cluster.run("scancel", cancelled)
    for job_id, state in {done: "COMPLETED", f"{array}_0": "COMPLETED", cancelled: "CANCELLED"}.items():
        cluster.wait_for_job(job_id, state)
    for job_id in (failed, task_killed, shell_killed, f"{array}_1"):
        cluster.wait_for_job(job_id, "FAILED")
    running = cluster.submit("sleep 100", "--nodes=2", "--exclusive", "--chdir=/")  # it is shown
    cluster.wait_for_job(running, "RUNNING")
    waiting = cluster.submit("true", "--array=3-4")
    wait_for(lambda: cluster.job(f"{waiting}_3")["Reason"] == "Resources", "a reason to wait")
    return [done, failed, task_killed, shell_killed, cancelled, array, running, waiting]


def main() -> None:
    with DevCluster.start(tempfile.mkdtemp(prefix="devcluster-")) as cluster:
        job_ids = submit_all(cluster)
        sacct = (*COMMANDS["sacct"], f"--jobs={','.join(job_ids)}")
        # The database learns of all this somewhat later, in any order.
        settled = (f"{job_ids[5]}_0|COMPLETED", f"{job_ids[5]}_1|FAILED", f"{job_ids[6]}|RUNNING", "|PENDING")
        wait_for(lambda: all(row in cluster.run(*sacct) for row in settled), "all jobs in accounting")
        shown = {name: cluster.run(*command) for name, command in {**COMMANDS, "sacct": sacct}.items()}
        shown["scontrol-job"] = cluster.run("scontrol", "--oneliner", "show", "job", job_ids[6])
        shown["sbatch"] = cluster.run("sbatch", "--output=/dev/null", "--wrap=true")
        shown["sbatch-parsable"] = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true")
        job_ids += [shown["sbatch"].split()[-1], shown["sbatch-parsable"].strip()]
    shown["scontrol-config"] = "".join(re.findall(rf"^(?:{KEPT}).*\n", shown["scontrol-config"], re.MULTILINE))
    version = re.search(r"SLURM_VERSION *= *(\S+)", shown["scontrol-config"])
    assert version is not None
    folder = RECORDED / version[1]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in shown.items():
        for number, job_id in enumerate(job_ids, 1):
            text = re.sub(rf"\b{job_id}(?!\d)", str(number), text)
        (folder / f"{name}.txt").write_text(re.sub(" +$", "", text, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
