"""wandb's server: whether it can be used from here, and what of an address may be shown."""

import contextlib
import os
import re
import threading

ANSWER_S = 3.0
"""How long a server may take to answer before a run is tracked offline."""


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
