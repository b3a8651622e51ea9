"""Models that only the hub has: a running server fetches them, and its progress is shown here."""

import contextlib
from typing import Any

from common.errors import HubError, MlxspecError
from router.cli.client import Client, quoted
from router.cli.output import Output
from router.cli.progress import showing
from router.hub.ids import looks_like_id
from router.hub.wishes import Progress

EVENT_TIMEOUT_S = 60.0  # the server says every few seconds that it is there


def fetch_unknown(client: Client, model: str, output: Output) -> None:
    """Have the server fetch `model` if it does not know it and it looks like an id of the hub.

    Ctrl-C cancels the download; what came is kept. Raises the download's error.
    """
    known = {entry["id"] for entry in client.get("/v1/models")["data"]}
    if model in known or not looks_like_id(model):
        return
    output.note(f"{model} is not on the server yet: it is fetched first")
    job = client.call("POST", "/hf/models/download", {"id": model})
    try:
        _watch(client, job["id"], model, output)
    except KeyboardInterrupt:
        with contextlib.suppress(MlxspecError):  # it has just ended
            client.call("DELETE", f"/hf/jobs/{quoted(job['id'])}")
        output.note("stopped; what came is kept, the same command goes on from there")
        raise


def _watch(client: Client, job: str, model: str, output: Output) -> None:
    state: dict[str, Any] = {}
    with showing(output, model) as tell:
        for state in client.events("GET", f"/hf/jobs/{quoted(job)}/events", timeout_s=EVENT_TIMEOUT_S):
            tell(Progress(stage=state["stage"], done_bytes=state["done_bytes"], total_bytes=state["total_bytes"]))
    if state.get("status") == "cancelled":
        raise HubError(f"the download of {model} was cancelled by somebody else; what came is kept")
