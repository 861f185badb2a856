"""wandb's server: whether it can be used from here, and what of an address may be shown."""

import contextlib
import os
import re
import threading
from pathlib import Path

ANSWER_S = 3.0
"""How long a server may take to answer before a run is tracked offline."""


def wrong_variables() -> list[str]:
    """Returns the names of the environment's variables with whose values wandb does not start at all.

    Without WANDB_MODE, which is read by us (`jobs.tracking.dashboard.MODES`).
    """
    import wandb  # here and below, because it takes most of a second, and a run without tracking does not need it

    wrong = []
    for name, value in _variables().items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except Exception:
            wrong.append(name)
    return wrong


def address() -> str:
    """Returns where the server is: as WANDB_BASE_URL says, or else as `wandb login --host` has stored it.

    wandb itself must be able to read the environment (`wrong_variables`). This does what wandb.setup() does, but that
    also starts a process, and waits for ever where it cannot.
    """
    import wandb

    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    settings = wandb.Settings(silent=True, settings_system=str(folder.expanduser() / "settings"))
    settings.update_from_system_settings()
    settings.update_from_env_vars(_variables())
    return str(settings.base_url)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_") and name != "WANDB_MODE"}


def why_not_online(base_url: str) -> str | None:
    """Asks the server who we are; returns what is wrong or None, within `ANSWER_S`."""
    import requests

    server, netrc = public(base_url), requests.utils.get_netrc_auth(base_url)
    key = os.environ.get("WANDB_API_KEY") or (netrc and netrc[1])
    if not key:
        return "there is no key, which `wandb login` would store"
    answers = []

    def ask() -> None:
        query = {"query": "query { viewer { id } }"}
        with contextlib.suppress(requests.RequestException):
            url = f"{base_url.rstrip('/')}/graphql"
            answers.append(requests.post(url, json=query, auth=("api", key), timeout=ANSWER_S))

    # In a thread, because the timeout of requests counts from packet to packet: a slow server could take for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not answers:
        return f"{server} does not answer within {ANSWER_S:.0f} s"
    answer = answers[0]
    # GraphQL may answer 200 to a key that it does not know: then nobody is the viewer.
    if answer.status_code in (401, 403) or (answer.ok and '"viewer":null' in answer.text.replace(" ", "")):
        return f"{server} does not accept the key"
    return None if answer.ok else f"{server} answers with error {answer.status_code}"


def public(text: str) -> str:
    """The text without users and passwords in its addresses, as in http://USER:PASSWORD@HOST.

    A password is cut to the last @: one with / or @ in it ought to be encoded, and often is not.
    """
    return re.sub(r"(?<=://)([^/\s:]*:\S*|[^/\s]*)@", "", text)
