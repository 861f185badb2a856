"""What a GPU's driver knows of its errors, asked of nvidia-smi where there is one.

Nothing that is odd about nvidia-smi itself is a fault: it may be missing, old, slow, or hang.
"""

import os
import re
import subprocess
import time
from contextlib import suppress

PATIENCE_S = 0.9
"""Seconds to wait for nvidia-smi."""
ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "has had {} uncorrected memory errors since its last reset",
    "retired_pages.pending": "goes on using a bad page of its memory until its driver is loaded anew",
    "remapped_rows.failure": "could not replace a bad row of its memory",
}
"""What is asked of its memory, and what an answer other than none means. Rows that wait to be replaced do no harm until
then."""
RECOVERY = {"gpu_recovery_action": "has a fault that lasts until it gets a {}"}
"""What the driver advises after the errors that it reports as Xid events: those themselves nvidia-smi does not tell.

A question of its own, because drivers before 2024 do not know it and would refuse the others with it. A GPU that is to
be drained still computes (https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt, "Recovery action flag")."""
IGNORE = "IGNORE_GPU_ERRORS"
"""If this environment variable is set, nobody asks: for a machine with no other GPU."""
BAD = re.compile(r"0*[1-9]\d*|yes|(\w+ )?(reset|reboot)", re.IGNORECASE)
"""Others are 0, No, None, [N/A], [Not Supported], Drain and Reset, ..."""


class Question:
    """Asks about one GPU, by its UUID, while other work is done."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._asked = [] if os.environ.get(IGNORE) else self._ask([[*ERRORS], [*RECOVERY]])

    def _ask(self, questions: list[list[str]]) -> "list[tuple[list[str], subprocess.Popen[str]]]":
        asked = []
        for fields in questions:
            command = ["nvidia-smi", f"--id={self._uuid}", f"--query-gpu=index,{','.join(fields)}"]
            with suppress(OSError):  # there is none, or it cannot be started
                process = subprocess.Popen(
                    [*command, "--format=csv,noheader,nounits"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                )
                asked.append((fields, process))
        return asked

    def answer(self) -> str | None:
        """Says what is wrong with the GPU, None if nothing is known of that; takes at most `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        memory, recovery = self._asked[:1], self._asked[1:]
        answers = _read(memory, deadline)
        # One name that it does not know is enough. One that hangs does so again.
        if not answers and memory and time.monotonic() < deadline:
            answers = _read(self._ask([[field] for field in ERRORS]), deadline)
        answers += _read(recovery, deadline)
        for fields, (index, *values) in answers:
            for field, value in zip(fields, values, strict=True):
                if BAD.fullmatch(value):
                    what = f"{(ERRORS | RECOVERY)[field].format(value.lower())} ({field} is {value})"
                    return f"GPU {index} ({self._uuid}) {what}; {IGNORE}=1 uses it all the same"
        return None


def _read(asked: "list[tuple[list[str], subprocess.Popen[str]]]", deadline: float) -> list[tuple[list[str], list[str]]]:
    """Returns the fields and values of those that answer in time and as they should."""
    found = []
    for fields, process in asked:
        try:
            said, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()
            with suppress(subprocess.TimeoutExpired):  # one that waits for its driver does not even die
                process.wait(0.05)
            continue
        row = [cell.strip() for cell in said.strip().split(",")]
        if process.returncode == 0 and len(row) == 1 + len(fields):
            found.append((fields, row))
    return found
