"""`mlxspec run`: talk to a model in the terminal."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from common.errors import InvalidRequest, MlxspecError
from common.states import WorkerState
from router.cli.client import Client, connect
from router.cli.fetching import fetch_unknown
from router.cli.output import ExitStatus, NoServer, Output
from router.cli.verbs import MODELS, Verbs, add_server, number

ANSWER_TIMEOUT_S = 600.0  # between two tokens, or until the model is loaded
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not steer the terminal.
CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})
HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C ends an answer"


def add_verbs(verbs: Verbs) -> None:
    run = verbs.add(
        "run",
        topic=MODELS,
        help="talk to a model: one prompt, or a conversation",
        description="Talk to a model of the running server, which loads it if need be. Without PROMPT it is a "
        "conversation; '-' reads the prompt from standard input.",
        examples='mlxspec run smollm2-135m "What is the capital of France?"\ngit diff | mlxspec run smollm2-135m -',
        run=run_model,
    )
    run.add_argument("model", metavar="MODEL", help="a name of `mlxspec list`, an id of Hugging Face, or a group")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="one message; without it, a conversation")
    run.add_argument("--system", metavar="TEXT", help="a system message")
    run.add_argument("--max-tokens", metavar="N", type=int, help="most tokens of an answer")
    run.add_argument("--temperature", metavar="T", type=number, help="0 is greedy")
    run.add_argument("--seed", metavar="N", type=int, help="same seed, same text")
    run.add_argument("--no-speculation", action="store_true", help="decode plainly")
    run.add_argument("--show-drafts", action="store_true", help="show accepted draft tokens dim")
    run.add_argument("--stats", action="store_true", help="end each answer with its figures")
    add_server(run)


def run_model(options: argparse.Namespace, output: Output) -> int:
    if not options.model.strip():
        raise InvalidRequest("MODEL is empty; `mlxspec list` names those there are")
    client = connect(options)
    _prepare(client, options.model, output)
    talk = Talk(client, options, output)
    if options.prompt is not None:
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
        if not prompt.strip():
            raise InvalidRequest("the prompt is empty; write one, or none at all for a conversation")
        talk.turn(prompt)
        return ExitStatus.OK
    if output.is_json:
        raise InvalidRequest("--json needs a PROMPT")
    return converse(talk, output)


def converse(talk: "Talk", output: Output) -> int:
    """Read lines until the end of input."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        _edit_lines()
        output.note(HELP)
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except EOFError:
            if is_typed:
                output.note("")
            return ExitStatus.OK
        except KeyboardInterrupt:
            if not is_typed:
                raise
            output.note(f"\n{HELP}")
            continue
        if line in ("/quit", "/exit", "/bye"):
            return ExitStatus.OK
        if line in ("/help", "/?"):
            output.note(HELP)
        elif line == "/reset":
            talk.reset()
        elif line:
            try:
                talk.turn(line)
            except KeyboardInterrupt:
                output.note("\n(ended: the conversation goes on without this turn)")
            except NoServer:
                raise
            except MlxspecError as error:
                output.error(error)


def _edit_lines() -> None:
    """Arrow keys and a history for `input`."""
    with contextlib.suppress(ImportError):  # some builds of Python have none
        import readline  # noqa: F401


def _prepare(client: Client, model: str, output: Output) -> None:
    """Have a model that only the hub has fetched; say so when the first answer has to wait for the model."""
    fetch_unknown(client, model, output)
    states = {entry["name"]: entry["state"] for entry in client.get("/models")["models"]}
    if model not in states and (Path(model).expanduser() / "config.json").is_file():
        raise InvalidRequest(f"{model} is a folder; give it a name first: mlxspec load {model} --name NAME")
    if states.get(model, WorkerState.READY) != WorkerState.READY:
        output.note(f"{model} is not loaded yet: the first answer takes longer")


class Talk:
    """A conversation: the messages so far, and the options of each answer."""

    def __init__(self, client: Client, options: argparse.Namespace, output: Output) -> None:
        self._client, self._options, self._output = client, options, output
        self._messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def turn(self, prompt: str) -> None:
        """One message and its answer; an answer that failed leaves the conversation as it was."""
        self._messages.append({"role": "user", "content": prompt})
        try:
            text, usage = self._answer()
        except BaseException:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": text})
        if self._output.is_json:
            self._output.json({"text": text, "usage": usage})
            return
        self._output.write("\n")
        if self._options.stats:
            self._output.note(_figures(usage))

    def _answer(self) -> tuple[str, dict[str, Any]]:
        pieces: list[str] = []
        usage: dict[str, Any] = {}
        for chunk in self._client.events("POST", "/v1/chat/completions", self._body(), ANSWER_TIMEOUT_S):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                if text := choice.get("delta", {}).get("content"):
                    pieces.append(text)
                    self._show(text, int(choice.get("drafted_chars", 0)))
        return "".join(pieces), usage

    def _show(self, text: str, drafted: int) -> None:
        if self._output.is_json:
            return
        if self._output.is_terminal:
            before, after = text[:drafted].translate(CONTROLS), text[drafted:].translate(CONTROLS)
            text = f"{DIM}{before}{PLAIN}{after}" if before else after
        self._output.write(text)

    def _body(self) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {
            "model": options.model,
            "messages": self._messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        given = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
        body |= {key: value for key, value in given.items() if value is not None}
        if options.no_speculation:
            body["speculative"] = False
        if options.show_drafts:
            body["show_drafts"] = True
        return body


def _figures(usage: dict[str, Any]) -> str:
    details = usage.get("completion_tokens_details", {})
    accepted = details.get("accepted_prediction_tokens", 0)
    drafted = accepted + details.get("rejected_prediction_tokens", 0)
    return f"[{usage.get('completion_tokens', '?')} tokens, {accepted} of {drafted} drafted accepted]"
