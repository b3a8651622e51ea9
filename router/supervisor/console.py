"""What the server says to the person who started it: a line for each change, and how to try it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from common.config import ServerConfig
from common.messages import ModelEntry, ModelFacts, ModelTable
from common.states import WorkerState


class Console:
    """Plain lines on one stream; one that was closed is no error."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._table: ModelTable | None = None

    def say(self, *lines: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                print(line, file=self._stream, flush=True)

    def show(self, table: ModelTable) -> None:
        """Say what is new in the model table."""
        self.say(*news(self._table, table))
        self._table = table


def news(before: ModelTable | None, after: ModelTable) -> list[str]:
    """One line for each model whose state changed between two tables."""
    known = {entry.name: entry for entry in before.models} if before else {}
    return [line for entry in after.models for line in _model_news(known.get(entry.name), entry)]


def first_steps(server: ServerConfig, model: str | None) -> list[str]:
    """The address, and three things to try."""
    url = address(server)
    if model is None:
        return [f"mlxspec listens on {url} and has no model yet: start it with --model-path FOLDER_OR_HUGGING_FACE_ID"]
    json_header = "-H 'Content-Type: application/json'"
    messages = '[{"role": "user", "content": "Tell me a story."}]'
    chat = f'{{"model": "{model}", "stream": true, "messages": {messages}}}'
    return [
        "",
        f"mlxspec listens on {url}  (Ctrl-C ends it)",
        "",
        "Try:",
        f'  curl {url}/generate {json_header} -d \'{{"prompt": "What is the capital of France?"}}\'',
        f"  curl -N {url}/v1/chat/completions {json_header} \\\n       -d '{chat}'",
        f"  curl {url}/stats",
        "",
    ]


def address(server: ServerConfig) -> str:
    """The base URL of the HTTP server."""
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{server.port}"


def _model_news(before: ModelEntry | None, entry: ModelEntry) -> Iterator[str]:
    name, detail = entry.name, f": {entry.detail}" if entry.detail else ""
    if before and before.restarts != entry.restarts:
        yield f"{name} died{detail}; starting it again (restart {entry.restarts})"
    elif before and before.state == entry.state:
        return
    elif entry.state is WorkerState.STARTING:
        yield f"loading model {name} from {entry.path} …"
    match entry.state:
        case WorkerState.READY:
            yield f"{name} ready{_facts_text(entry.facts)}"
        case WorkerState.DRAINING:
            yield f"{name} finishes its requests and is unloaded"
        case WorkerState.STOPPED if before:
            yield f"{name} is unloaded"
        case WorkerState.BACKOFF:
            yield f"{name} died{detail}; next try in {entry.retry_after_s or 0:.1f} s"
        case WorkerState.FAILED:
            yield f"{name} cannot be loaded{detail}"


def _facts_text(facts: ModelFacts | None) -> str:
    if facts is None:
        return ""
    context = f"context {facts.context_tokens} tokens"
    return f" in {facts.load_s:.1f} s ({facts.weights_dtype}, {facts.backend}, {context})"
