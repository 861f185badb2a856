"""What `status RUN` shows: all that is known of one run."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from jobs.experiments import experiment_json
from jobs.experiments.table import EXPERIMENTS
from jobs.storage import account, checkpoints, faults, job_ids
from jobs.storage.records import now, read_jsonl
from jobs.storage.run_folder import RunFolder, State, number_of_shards
from jobs.terminal import tables
from jobs.watch import states
from jobs.watch.states import SlurmJob

SHOWN_FAULTS = 5
"""`status` shows people the newest ones; all are in faults.jsonl."""


def all_jobs(run: RunFolder) -> list[str]:
    """Ids of all jobs of the run: of its training, and the arrays and merges of its samples and evaluations."""
    launch = states.read_launch(run)
    return [job_id for key in ("job_ids", "sample_job_ids", "evaluate_job_ids") for job_id in launch.get(key, [])]


def describe(run: RunFolder, jobs: Mapping[str, SlurmJob] | None) -> dict[str, Any]:
    """Describes the run for scripts; `jobs` is what Slurm says of `all_jobs`, None if it does not answer."""
    status, launch = states.read_status(run), states.read_launch(run)
    overview = states.summarize(run, jobs)
    until = now() if overview.state in states.UNSETTLED else None
    time = account.of_run(run, launch, {**status, "state": overview.state}, until)
    return {
        **asdict(overview),
        "held_out_loss": status.get("held_out_loss"),
        "quality": next(reversed(read_jsonl(run.quality)), None),
        "time": {"whole_s": round(time.whole_s, 3), **asdict(time)},
        "settings": _settings(run),
        "checkpoints": checkpoints.steps(run.checkpoints),
        "samples": [_samples(run, path.parent) for path in sorted(run.path.glob("samples/*/manifest.json"))],
        "jobs": {job_id: _job(job_id, jobs) for job_id in launch.get("job_ids", [])},
        "sample_jobs": {job_id: _array(job_id, jobs) for job_id in launch.get("sample_job_ids", [])},
        "evaluate_jobs": {job_id: _array(job_id, jobs) for job_id in launch.get("evaluate_job_ids", [])},
        "faults": [asdict(fault) for fault in faults.read(run)],
        "missing": status.get("missing"),
        "failed_rank": status.get("failed_rank"),
        "traceback": status.get("traceback"),
    }


def render(detail: dict[str, Any], width: int) -> str:
    """The same for people, in lines of at most `width` characters but for a traceback."""
    failed = detail["state"] == State.FAILED and detail["traceback"] is not None
    is_said_below = failed and detail["reason"] in detail["traceback"]
    reason = "" if is_said_below or not detail["reason"] else f" ({detail['reason']})"
    lines = [f"{detail['path']}: {detail['state']}{reason}", *_line("progress", _progress(detail))]
    lines += _line("quality", *_quality(detail["quality"])) if detail["quality"] else []
    lines += _line("time", *_time(detail["time"]))
    lines += _line("missing", detail["missing"]) if detail["missing"] else []
    lines += _line("settings", *(f"{flag} {tables.setting(value)}" for flag, value in detail["settings"].items()))
    lines += _line("checkpoints", *(f"{step}" for step in detail["checkpoints"]))
    for entry in detail["samples"]:
        state = "complete" if entry["complete"] else f"{entry['shards']} of {entry['num_shards']} shards"
        lines += _line("samples", f"{entry['name']}: {entry['num_samples']:,}", state)
    for label, key in (("job", "jobs"), ("sampling", "sample_jobs"), ("evaluation", "evaluate_jobs")):
        for job_id, state in detail[key].items():
            lines += _line(label, f"{job_id} {state}")
    for fault in detail["faults"][-SHOWN_FAULTS:]:
        where = f" on {fault['node']}" if fault["node"] is not None else ""
        then = ("tried again" if fault["again"] else "not tried again") + (
            f", stacks in {fault['hang']}" if fault["hang"] else ""
        )
        lines += _line("fault", f"{fault['time'][:19]} after step {fault['checkpoint']}: {fault['cause']}{where}", then)
    if detail["faults"] and (left_out := detail["faults"][-1]["left_out"]):
        lines += _line("left out", *left_out)
    if failed:
        rank = detail["failed_rank"]
        lines += _line("failure", "what is known of it:" if rank is None else f"process {rank} failed first:")
    # Further lines begin where `_line` ends its labels. Flags stay whole, so that they can be copied.
    lines = [textwrap.fill(line, width, subsequent_indent=" " * 15, break_on_hyphens=False) for line in lines]
    return "\n".join([*lines, *(detail["traceback"].rstrip().splitlines() if failed else [])])


def _progress(detail: dict[str, Any]) -> str:
    """Puts step, loss, rate, time left, restarts and an old heartbeat into one line."""
    age_s = detail["heartbeat_age_s"]
    silent = age_s is not None and age_s > states.SILENT_S
    total, loss, rate = detail["total"], detail["loss"], detail["rate_images_per_s"]
    held_out = detail["held_out_loss"]
    parts = [
        f"step {detail['step']:,}" + (f" of {total:,}" if total is not None else ""),
        f"loss {loss:.4f}" if loss is not None else "",
        f"held-out loss {held_out:.4f}" if held_out is not None else "",
        f"{rate:,.0f} images/s" if rate is not None else "",
        f"{tables.duration(detail['eta_s'])} left" if detail["eta_s"] is not None else "",
        f"{restarts} restart{'s' if restarts > 1 else ''}" if (restarts := detail["restarts"]) else "",
        f"{'ended' if detail['state'] == State.FINISHED else 'last heard of'} {tables.duration(age_s)} ago"
        if silent
        else "",
    ]
    return ", ".join(filter(None, parts))


def _quality(judged: dict[str, Any]) -> list[str]:
    """Says how good the samples of the last judged checkpoint were (--train.evaluate-every)."""
    found = []
    for metric in judged["metrics"].values():
        interval = f" ({metric['low']:.4f} to {metric['high']:.4f})" if metric["low"] is not None else ""
        floor = [f"floor {metric['floor']:.4f}"] if metric["floor"] is not None else []
        found += [f"{metric['label']} {metric['value']:.4f}{interval}", *floor]
    return [f"step {judged['step']:,}", *found]


def _time(time: dict[str, Any]) -> list[str]:
    """Says how the time since the first submission was spent, without the parts that took none of it."""
    whole_s, redone = time["whole_s"], time["redone_steps"]
    parts = [(name, time["seconds"][part]) for part, name in account.PARTS.items()]
    shares = [f"{name} {tables.duration(spent)} ({spent / whole_s:.0%})" for name, spent in parts if spent >= 0.5]
    return [f"{tables.duration(whole_s)} in all", *shares, *([f"{redone:,} steps redone"] if redone else [])]


def _settings(run: RunFolder) -> dict[str, Any]:
    """Returns flags and values: the most important ones, and all that differ from the preset."""
    try:
        experiment, config = run.read_experiment()
    except UserError:  # of another version of this program
        return {}
    train = config.train
    always = {"train.batch-size": train.batch_size, "train.lr": train.lr, "train.seed": train.seed}
    changed = experiment_json.differences(EXPERIMENTS[experiment].preset, config)
    usual = {"train.steps", "data.sha256"}  # a hash is no choice
    if train.grad_shards == states.read_launch(run).get("resources", {}).get("processes"):
        usual.add("train.grad-shards")  # they are as many without being asked for
    return {**always, **{flag: value for flag, _, value in sorted(changed) if flag not in usual}}


def _samples(run: RunFolder, folder: Path) -> dict[str, Any]:
    try:
        manifest = run.read_samples(folder.name)
        num_samples = manifest["num_samples"]
        num_shards = number_of_shards(num_samples, manifest["shard_size"])
        facts = {"num_samples": num_samples, "complete": manifest["complete"], "num_shards": num_shards}
    except (OSError, UserError, KeyError):
        facts = {"num_samples": 0, "complete": False, "num_shards": 0}
    there = {path.name for path in folder.glob("shard-*.npy")}
    # A set that was to be larger may have more of them.
    shards = sum(f"shard-{shard:05d}.npy" in there for shard in range(facts["num_shards"]))
    return {"name": folder.name, **facts, "shards": shards}


def _job(job_id: str, jobs: Mapping[str, SlurmJob] | None) -> str:
    """Writes state and nodes of a job."""
    if jobs is None or job_id not in jobs:
        return "unknown" if jobs is None else "forgotten by Slurm"
    job = jobs[job_id]
    more = job.reason or job.signal if job.phase != "running" else ""
    return job.state + (f" ({more})" if more else "") + (f" on {job.nodes}" if job.nodes else "")


def _array(job_id: str, jobs: Mapping[str, SlurmJob] | None) -> str:
    """The state of a job, or how many tasks of an array are in which state."""
    known = jobs or {}
    states = [known[task].state for task in job_ids.elements(job_id, known)]
    if not states:
        return _job(job_id, jobs)
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _line(label: str, *parts: str) -> list[str]:
    return [f"  {label:<12} {', '.join(parts)}"] if parts else []
