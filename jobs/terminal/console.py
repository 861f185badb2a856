"""What a job says: on its terminal, and in a file that stays."""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm


class Console:
    """Prints, and keeps what it has printed in a file."""

    def __init__(self, log: Path | None) -> None:
        self._log = log

    def say(self, text: str) -> None:
        # `print` would write into the progress bar; this clears it, and draws it again below the text.
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        self.log(text)

    def log(self, text: str) -> None:
        """Writes to the file only; if the disk is full, the line is lost."""
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")
