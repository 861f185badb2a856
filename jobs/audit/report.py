"""What an audit has found: where checkpoints and metrics are the run's own, and where they begin to differ."""

import shutil
from typing import Any

from diffusion.errors import reason
from jobs.audit.plan import Audit, Stretch
from jobs.files import write_atomically
from jobs.storage.records import read_jsonl
from jobs.storage.run_folder import RunFolder, as_typed


def conclude(audit: Audit) -> tuple[bool, str]:
    """Whether all is computed and equal, and what to tell people; keeps that in report.txt, if it can be written.

    Checkpoints that were computed stay where one differs, to be looked at.
    """
    recorded = {line["step"]: line for line in read_jsonl(RunFolder(audit.run).metrics)}
    equal, lines = True, []
    for stretch in audit.stretches:
        is_equal, (said, *more) = _compare(stretch, recorded)
        equal &= is_equal
        lines += [f"steps {stretch.start} to {stretch.stop}: {said}", *(f"  {line}" for line in more)]
        if is_equal:
            shutil.rmtree(RunFolder(stretch.again).checkpoints, ignore_errors=True)
    if equal:
        first, last = audit.stretches[0].start, audit.stretches[-1].stop
        lines.append(f"Steps {first} to {last} are what this code makes of these settings.")
    else:
        lines.append(f"What was computed is in {as_typed(audit.folder)}.")
    text = "\n".join(lines)
    try:
        write_atomically(audit.folder / "report.txt", text + "\n")
    except OSError as error:  # hours of computing must not be lost to a full disk
        text += f"\nThis is not kept: {reason(error)}"
    return equal, text


def _compare(stretch: Stretch, recorded: dict[int, dict[str, Any]]) -> tuple[bool, list[str]]:
    """Returns whether a stretch is computed and equal, and a sentence that says so."""
    computed, other = stretch.computed(), stretch.different()
    # The run may have logged other steps: --train.log-every may change whenever it goes on.
    metrics = [line for line in read_jsonl(RunFolder(stretch.again).metrics) if line["step"] in recorded]
    # A version may record what another does not.
    parting = [
        (line["step"], names)
        for line in metrics
        if (names := [name for name, value in line.items() if recorded[line["step"]].get(name, value) != value])
    ]
    more = [f"from step {step} on: metrics.jsonl ({', '.join(names)})" for step, names in parting[:1]]
    if other is not None:
        files = [name for name, digest in stretch.hashes[other].items() if computed[other].get(name) != digest]
        last = max((step for step in computed if step < other), default=stretch.start)
        more += [f"equal at step {last}, different at step {other}: {', '.join(files)}"]
    more += [
        f"the settings of the start at step {part.facts['step']} were not recorded: it is computed with today's"
        for part in stretch.parts
        if not part.is_known
    ]
    # Where it computed otherwise than the run did: on another machine, with other threads or versions.
    more += [
        f"from step {line['step']} on bytes may differ: {'; '.join(line['differing'])}"
        for line in read_jsonl(RunFolder(stretch.again).timing)
        if line["differing"]
    ]
    if other is not None or parting:
        return False, ["DIFFERENT", *more]
    if not stretch.is_done():
        return False, [f"not computed after step {max(computed, default=stretch.start)}", *more]
    checkpoints = f"{len(computed)} checkpoint{'s' if len(computed) > 1 else ''}"
    return True, [f"{checkpoints} and {len(metrics)} lines of metrics.jsonl are equal", *more]
