"""The worker from the shell: one model, the same engine, no router; shows what speculation does, token by token."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
from rich.console import Console
from rich.table import Table

from common import config as configuration
from common import logs
from common.config import Config, ModelConfig, default_speculation
from common.errors import InvalidRequest, MlxspecError
from common.messages import ChatMessage, ChatPrompt, Prompt, TextPrompt
from common.sampling import Sampling, Speculation, check_sampling
from common.states import ExitCode
from worker.assemble import Ready, assemble
from worker.io_thread import text_stream
from worker.report import Gain, StepReport
from worker.request import Request
from worker.template import check_length, to_tokens

_DRAFTED = "\x1b[32m"
_PLAIN = "\x1b[0m"


@dataclass(slots=True)
class Run:
    """One answer and what it took."""

    text: str = ""
    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: str = ""
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    prefill_s: float = 0.0
    prompt_tokens: int = 0
    speedup: float | None = None
    first_token_s: float | None = field(default=None)

    def add(self, report: StepReport) -> None:
        self.steps += 1
        self.draft_s += report.draft_s
        self.verify_s += report.verify_s
        self.total_s += report.total_s

    def summary(self) -> dict[str, Any]:
        """The figures, in the field's words and units."""
        other_s = self.total_s - self.draft_s - self.verify_s
        decode_s = self.total_s - self.prefill_s
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "finish_reason": self.finish,
            "steps": self.steps,
            "tokens_per_step": round(self.tokens / max(self.steps, 1), 3),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": round(self.accepted / self.drafted, 3) if self.drafted else None,
            "draft_ms_per_step": round(self.draft_s / max(self.steps, 1) * 1e3, 3),
            "verify_ms_per_step": round(self.verify_s / max(self.steps, 1) * 1e3, 3),
            "other_ms_per_step": round(other_s / max(self.steps, 1) * 1e3, 3),
            "time_to_first_token_s": round(self.first_token_s, 3) if self.first_token_s is not None else None,
            "tokens_per_second": round(max(self.tokens - 1, 0) / decode_s, 2) if decode_s > 0 else None,
            "speedup": round(self.speedup, 3) if self.speedup is not None else None,
        }


def main(arguments: Sequence[str]) -> int:
    """Parse, load, answer; returns the exit code."""
    options = _parser().parse_args(arguments)
    logs.setup("worker", options.log_level)
    try:
        settings = configuration.load(Path(options.config) if options.config else None)
        shell = Shell(options, settings)
        return shell.repl() if options.repl else shell.answer_once()
    except MlxspecError as error:
        print(f"mlxspec-worker: {error}", file=sys.stderr)
        return ExitCode.BAD_MODEL
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlxspec-worker",
        description="Run one model in the foreground: the server's engine without the server.",
        epilog="Accepted draft tokens are shown in green on a terminal. "
        'Example: mlxspec-worker smollm2-135m --prompt "What is the capital of France?" --temperature 0',
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, name below MLXSPEC_HOME/models, or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one user message ('-' reads it from standard input)")
    source.add_argument("--messages", metavar="FILE", help='JSON list of {"role", "content"}')
    source.add_argument("--repl", action="store_true", help="a conversation; /reset starts anew, /quit ends")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    parser.add_argument("--max-tokens", type=int, metavar="N", default=256, help="tokens to make (default 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the configuration's)")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="P", help="against tokens of prompt and answer")
    parser.add_argument("--presence-penalty", type=float, metavar="P", help="against tokens of the answer")
    parser.add_argument("--frequency-penalty", type=float, metavar="P", help="the same for each time they occur")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="same seed, same text (default 0)")
    parser.add_argument("--no-speculation", action="store_true", help="decode plainly")
    parser.add_argument("--max-draft-tokens", type=int, metavar="K", help="draft at most K tokens a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and table")
    parser.add_argument("--trace", metavar="FILE", help="write one JSON line a step")
    parser.add_argument("--config", metavar="FILE", help="configuration (default: MLXSPEC_HOME/config.toml)")
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return parser


class Shell:
    """A loaded model and the options of this run."""

    def __init__(self, options: argparse.Namespace, settings: Config) -> None:
        self.options = options
        self.sampling = _sampling(options, settings)
        self.speculation = _speculation(options, settings)
        self.prompt = None if options.repl else _read_prompt(options)
        path = configuration.resolve_model_path(options.model)
        model = settings.models.get(options.model) or ModelConfig(path=path)
        self.ready: Ready = assemble(configuration.resolve_model_path(model.path), settings, model)
        self.trace: IO[str] | None = open(options.trace, "w", encoding="utf-8") if options.trace else None  # noqa: SIM115
        self.marks = sys.stdout.isatty() and not options.json

    def answer_once(self) -> int:
        assert self.prompt is not None
        run = self.run(self.prompt, quiet=self.options.json)
        if self.options.json:
            print(json.dumps({"text": run.text, **run.summary()}))
        else:
            print()
            self._print_table(run)
        return ExitCode.OK

    def repl(self) -> int:
        """A conversation until end of input."""
        history: list[ChatMessage] = []
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return ExitCode.OK
            if line in ("/quit", "/exit"):
                return ExitCode.OK
            if line == "/reset":
                history.clear()
                continue
            if line:
                self._turn(history, line)

    def _turn(self, history: list[ChatMessage], line: str) -> None:
        history.append(ChatMessage(role="user", content=line))
        try:
            run = self.run(ChatPrompt(messages=tuple(history), plain_fallback=True), quiet=False)
        except InvalidRequest as error:
            history.pop()
            print(f"! {error}", file=sys.stderr)
            return
        print()
        history.append(ChatMessage(role="assistant", content=run.text))
        figures = run.summary()
        print(
            f"[{figures['tokens_per_second']} tokens/s, {figures['tokens_per_step']} tokens a step, "
            f"{run.accepted} of {run.drafted} drafted accepted]",
            file=sys.stderr,
        )

    def run(self, prompt: Prompt, *, quiet: bool) -> Run:
        """Generate one answer, printing it as it comes unless `quiet`."""
        request = self._request(prompt)
        stream = text_stream(self.ready.tokenizer, self.ready.end_tokens)
        engine, run = self.ready.engine, Run(prompt_tokens=len(request.prompt))
        engine.submit(request)
        began = time.perf_counter()
        while engine.has_work:
            report = engine.step()
            run.add(report)
            self._write_trace(report)
            for gain in report.gains:
                if gain.error is not None:
                    raise gain.error
                if run.first_token_s is None and gain.tokens:
                    run.first_token_s = time.perf_counter() - began
                    run.prefill_s = run.total_s
                self._show(run, stream, gain, quiet=quiet)
        return run

    def _request(self, prompt: Prompt) -> Request:
        facts = self.ready.facts
        tokens = to_tokens(prompt, self.ready.tokenizer, facts.vocabulary)
        return Request(
            request_id="shell",
            prompt=tuple(tokens),
            sampling=self.sampling,
            max_tokens=check_length(len(tokens), self.options.max_tokens, facts.context_tokens),
            end_tokens=self.ready.end_tokens,
            speculation=self.speculation,
            arrived_s=time.perf_counter(),
        )

    def _show(self, run: Run, stream: Any, gain: Gain, *, quiet: bool) -> None:
        run.tokens += len(gain.tokens)
        run.drafted += gain.drafted
        run.accepted += gain.accepted
        for i, token in enumerate(gain.tokens):
            self._print(run, stream.push([token]), is_drafted=i < gain.accepted, quiet=quiet)
        if gain.finish:
            run.finish = gain.finish
            self._print(run, stream.finish(), is_drafted=False, quiet=quiet)
            timings = gain.timings
            if timings and timings.plain_decode_s and timings.measured_decode_s:
                run.speedup = timings.plain_decode_s / timings.measured_decode_s

    def _print(self, run: Run, text: str, *, is_drafted: bool, quiet: bool) -> None:
        run.text += text
        if not quiet and text:
            marked = f"{_DRAFTED}{text}{_PLAIN}" if is_drafted and self.marks else text
            print(marked, end="", flush=True)

    def _write_trace(self, report: StepReport) -> None:
        if self.trace is None:
            return
        line = {name: getattr(report, name) for name in report.__slots__ if name != "gains"}
        line["gains"] = [
            {"tokens": list(g.tokens), "drafted": g.drafted, "accepted": g.accepted, "finish": g.finish}
            for g in report.gains
        ]
        self.trace.write(json.dumps(line) + "\n")
        self.trace.flush()

    def _print_table(self, run: Run) -> None:
        facts = self.ready.facts
        table = Table(title=f"{self.options.model}: {facts.weights_dtype} on {facts.backend}", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in run.summary().items():
            table.add_row(name.replace("_", " "), "–" if value is None else str(value))
        Console(stderr=True).print(table)


def _sampling(options: argparse.Namespace, settings: Config) -> Sampling:
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(options, name) for name in (*names, *penalties)}
    defaults = configuration.default_sampling(settings.generation)
    sampling: Sampling = msgspec.structs.replace(defaults, **{k: v for k, v in given.items() if v is not None})
    check_sampling(sampling)
    return sampling


def _speculation(options: argparse.Namespace, settings: Config) -> Speculation:
    if options.no_speculation:
        return Speculation(drafter="none")
    defaults = default_speculation(settings.speculation)
    if options.max_draft_tokens is None:
        return defaults
    return Speculation(drafter=defaults.drafter, max_draft_tokens=options.max_draft_tokens)


def _read_prompt(options: argparse.Namespace) -> Prompt:
    if options.messages:
        return ChatPrompt(messages=_read_messages(Path(options.messages)))
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.raw:
        return TextPrompt(text=text)
    return ChatPrompt(messages=(ChatMessage(role="user", content=text),), plain_fallback=True)


def _read_messages(path: Path) -> tuple[ChatMessage, ...]:
    try:
        messages = msgspec.json.decode(path.read_bytes(), type=tuple[ChatMessage, ...])
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f'{path} is not a JSON list of {{"role", "content"}}: {error}') from error
    if not messages:
        raise InvalidRequest(f"{path} holds no messages")
    return messages
