"""Tells people that a run has finished, has failed or hangs: by mail, a webhook or wandb.

`tell` starts `python -m jobs.notify RUN EVENT DETAIL` for it, so that no server can fail or hold up a job for long. A
mark in the run's folder says that it was done: once after a person has started the run, however often it is queued.
"""

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusion.errors import UserError
from jobs.followers.start import FollowerProcess, online_mark
from jobs.storage.run_folder import RunFolder, State

Event = Literal["finished", "failed", "hung"]
WORDS: dict[Event, str] = {"finished": "is finished", "failed": "has failed", "hung": "hangs"}

URL = "DIFFUSION_WEBHOOK"
"""The variable that holds the webhook's address: a setting would show it, and it may be a secret."""
ADDRESS = "DIFFUSION_MAIL"
"""The variable that may hold an address for mail; otherwise it goes to the user on this machine."""
ANSWER_S = 8.0
"""A mail program or a server may take so long."""
END_S = 28
"""All of it may take so long; the job waits for `jobs.followers.start.PATIENCE_S`."""


@dataclass(frozen=True)
class Message:
    """What people are told."""

    event: Event
    title: str
    text: str
    facts: dict[str, object]
    """The same for programs."""


def check(channels: Collection[str]) -> None:
    """Raises UserError if what a channel needs is missing; the address is not shown."""
    if "webhook" in channels and not os.environ.get(URL, "").startswith(("http://", "https://")):
        raise UserError(f"--tracking.notify webhook needs ${URL}, the address to post to: http(s)://...")


def rearm(run: RunFolder) -> None:
    """Forgets what has been told, because a person starts or continues the run."""
    for mark in run.path.glob(run.told("*").name):
        mark.unlink(missing_ok=True)


def tell(run: RunFolder, event: Event, say: Callable[[str], None], detail: str = "") -> None:
    """Tells whoever the run's settings name, unless that has been done. Never raises, and takes half a minute at most.

    `say` gets what goes wrong; `detail` is a line for people.
    """
    try:
        # A process that fails calls this before anybody has decided whether the run is tried again.
        tried_again = event == "failed" and run.state() is not State.FAILED
        if not _channels(run, event) or tried_again:
            return
        try:
            # Only one of several processes can make it.
            os.close(os.open(run.told(event), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return
        except OSError:
            pass  # the disk is full, which is worth telling
        FollowerProcess("jobs.notify", [str(run.path), event, detail], say).close(wait=True)
    except Exception as error:
        say(f"Nobody is told that {run} {WORDS[event]} ({type(error).__name__})")


def _channels(run: RunFolder, event: Event) -> list[str]:
    """Returns the channels that the settings name, and wandb where the run is tracked online and wants alerts.

    But that an online run is finished is said by the process that follows it (jobs/followers/alerts.py), which is
    still there. Offline, that process leaves it to wandb as a channel, because the network may be back.
    """
    _, config = run.read_experiment()
    named: list[str] = [*(config.tracking.notify or ())]
    if not (config.tracking.alerts and online_mark(run).exists()):
        return named
    others = [channel for channel in named if channel != "wandb"]
    return others if event == "finished" else [*others, "wandb"]


def compose(run: RunFolder, event: Event, detail: str) -> Message:
    """Says how far the run has come, why it failed, and how it goes on."""
    status = run.read_status()
    step, total, loss = status.get("step", 0), status.get("total"), status.get("loss")
    if event == "failed" and not detail:
        detail = (str(status.get("traceback") or "").strip().splitlines() or [""])[-1]
    lines = [
        f"step {step:,}"
        + (f" of {total:,}" if total is not None else "")
        + (f", loss {loss:.4f}" if loss is not None else ""),
        detail,
        f"{status.get('host', '')}:{run.path}",
        "" if event == "finished" else f"Continue with: python launch.py resume {run.path}",
    ]
    facts: dict[str, object] = {"run": run.label, "path": str(run.path), "event": event, "detail": detail}
    facts |= {name: status.get(name) for name in ("step", "total", "loss", "host", "restarts", "updated")}
    return Message(event, f"{run.label} {WORDS[event]}", "\n".join(filter(None, lines)), facts)


def _mail(run: RunFolder, message: Message) -> None:
    to = os.environ.get(ADDRESS) or getpass.getuser()
    if program := shutil.which("mail"):
        command, content = [program, "-s", message.title, to], message.text
    elif program := shutil.which("sendmail", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib"):
        # It is often in folders that are in root's PATH alone. With -t it takes the address from the text.
        command, content = [program, "-t"], f"To: {to}\nSubject: {message.title}\n\n{message.text}"
    else:
        raise UserError("there is neither mail nor sendmail on this machine")
    done = subprocess.run(command, input=f"{content}\n", text=True, capture_output=True, timeout=ANSWER_S, check=False)
    if done.returncode != 0:
        raise UserError(f"{program} ends with exit code {done.returncode}")


def _webhook(run: RunFolder, message: Message) -> None:
    """Posts JSON; Slack and Mattermost show its `text`, Discord its `content`."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    check(["webhook"])
    said = f"{message.title}\n{message.text}"
    body = json.dumps({"text": said, "content": said, **message.facts}).encode()
    # Discord refuses urllib's own User-Agent with error 403.
    headers = {"Content-Type": "application/json", "User-Agent": "diffusion-launcher"}
    try:
        with urlopen(Request(os.environ[URL], body, headers), timeout=ANSWER_S):
            pass
    except HTTPError as error:
        raise UserError(f"the server answers with error {error.code}") from None
    except Exception as error:  # its words may hold the address
        raise UserError(f"the server cannot be reached ({type(error).__name__})") from None


def _wandb(run: RunFolder, message: Message) -> None:
    """Sends an alert from a run of its own in the run's group, since the training's may still be written to."""
    from jobs.followers.loop import open_part
    from jobs.tracking.identity import ensure_id

    ensure_id(run)
    dashboard = open_part(run, message.event, "alert", message.facts)
    if not dashboard.is_shown:
        raise UserError("tracking is disabled")
    dashboard.alert(message.title, message.text, "INFO" if message.event == "finished" else "ERROR")
    dashboard.finish(0, preempted=False)


SEND = {"mail": _mail, "webhook": _webhook, "wandb": _wandb}


def main() -> None:
    from jobs.followers.loop import leave, say, use_own_temporary_folder

    use_own_temporary_folder()
    # Whatever hangs, a mail program or a library: the job waits no longer for this process.
    signal.signal(signal.SIGALRM, lambda number, frame: leave())
    signal.alarm(END_S)
    run, event = RunFolder(Path(sys.argv[1])), next(event for event in WORDS if event == sys.argv[2])
    message = compose(run, event, sys.argv[3])
    for channel in _channels(run, event):
        try:
            SEND[channel](run, message)
        except UserError as error:
            say(f"Nobody is told by {channel}: {error}")
        except Exception as error:
            say(f"Nobody is told by {channel} ({type(error).__name__})")
    leave()


if __name__ == "__main__":
    main()
