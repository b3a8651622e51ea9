"""Where the time of the batch loop goes: the engine in this process, without server and sockets.

usage: python -m tests.performance.loop_profile MODEL_FOLDER --prompts FILE [--rows 8] [--drafter NAME]

The prompts are answered several times: the first pass also makes kernels and compiles shapes, the last one runs under
cProfile, which makes Python look slower than it is. The others hold for the loop as it runs.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config, ModelConfig
from common.sampling import Sampling, Speculation
from tests.performance import prompts as texts
from tests.performance.ties import chat_tokens
from worker.assemble import Ready, assemble
from worker.report import StepReport
from worker.request import Request

SHOWN = 45


def main() -> int:
    options = parse()
    ready, prompts = prepared(options)
    for number in range(options.warm_up + 1):
        began = time.perf_counter()
        steps = run(ready, prompts, options, number)
        figures = summary(steps, time.perf_counter() - began)
        print(json.dumps({"pass": number} | figures, indent=1), flush=True)
    profile = cProfile.Profile()
    profile.enable()
    steps = run(ready, prompts, options, -1)
    profile.disable()
    print_profile(profile, len(steps))
    return 0


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--drafter", default="auto", help="none: plain decoding")
    return options.parse_args()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a script that answers questions in this process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="requests at a time")
    parser.add_argument("--max-chars", type=int, default=900)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--uneven", action="store_true", help="answers of half to one and a half times max-tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--warm-up", type=int, default=1, help="how often all prompts are answered before")
    parser.add_argument("--no-prefixes", action="store_true", help="without the prefix cache")
    return parser


def prepared(options: argparse.Namespace) -> tuple[Ready, list[tuple[int, ...]]]:
    """The model and the prompts that are asked for, as token ids; told in a line."""
    ready = loaded(options)
    chosen = texts.spread(texts.read(options.prompts, options.max_chars), options.n)
    prompts = [tuple(chat_tokens(ready, prompt)) for prompt in chosen]
    print(ready.facts.backend, ready.facts.weights_dtype, f"{len(prompts)} prompts", f"{options.rows} rows", flush=True)
    return ready, prompts


def loaded(options: argparse.Namespace) -> Ready:
    """The model with room for as many rows as are asked for."""
    model = ModelConfig(path=str(options.model), weights=options.weights, max_batch_size=options.rows)
    ready = assemble(str(options.model), Config(), model)
    if options.no_prefixes:
        ready.engine.prefixes.wanted_bytes = 0
    return ready


@dataclass(frozen=True, slots=True)
class Step:
    """What a step reported, and how many shapes it compiled."""

    report: StepReport
    shapes: int


def run(ready: Ready, prompts: list[tuple[int, ...]], options: argparse.Namespace, number: int) -> list[Step]:
    """Answer all prompts, so many at a time, without anything to copy from earlier runs."""
    return list(stepping(ready, prompts, options, number))


def stepping(ready: Ready, prompts: list[tuple[int, ...]], options: argparse.Namespace, number: int) -> Iterator[Step]:
    """The same, step by step."""
    engine = ready.engine
    engine.prefixes.forget()
    requests = made(ready, prompts, options, scope=str(number))
    live = 0
    while True:
        while live < options.rows and (request := next(requests, None)) is not None:
            engine.submit(request)
            live += 1
        if not engine.has_work:
            return
        shapes = engine.target.compiled_shapes
        report = engine.step()
        live -= sum(gain.finish is not None for gain in report.gains)
        yield Step(report, engine.target.compiled_shapes - shapes)


def made(ready: Ready, prompts: list[tuple[int, ...]], options: argparse.Namespace, scope: str) -> Iterator[Request]:
    for number, prompt in enumerate(prompts):
        yield Request(
            request_id=str(number),
            prompt=prompt,
            sampling=Sampling(temperature=options.temperature, seed=number),
            max_tokens=length_of(number, options),
            end_tokens=ready.end_tokens,
            speculation=Speculation(drafter=options.drafter),
            arrived_s=time.perf_counter(),
            scope=scope,
        )


def length_of(number: int, options: argparse.Namespace) -> int:
    """Tokens of an answer at most. Rows whose answers all have the same length end and begin in step, as long as nobody
    drafts, and prompts are read together: real ones do not."""
    return round(options.max_tokens * (0.5 + number * 0.618034 % 1.0)) if options.uneven else int(options.max_tokens)


def summary(steps: list[Step], wall_s: float) -> dict[str, Any]:
    """Means over the steps, in milliseconds: those that compiled shapes, those with prompts' chunks and the others."""
    usual = [step.report for step in steps if not step.shapes]
    parts = {
        "plain": [r for r in usual if not r.prefill_tokens and not r.drafted],
        "drafted": [r for r in usual if not r.prefill_tokens and r.drafted],
        "with prompts": [r for r in usual if r.prefill_tokens],
        "compiling": [step.report for step in steps if step.shapes],
    }
    figures: dict[str, Any] = {
        "tokens_per_s": round(sum(step.report.gained for step in steps) / wall_s, 1),
        "seconds": round(wall_s, 2),
        "shapes_compiled": sum(step.shapes for step in steps),
    }
    for name, part in parts.items():
        if part:
            figures[name] = {
                "steps": len(part),
                "seconds": round(sum(r.total_s for r in part), 2),
                "rows": mean([r.rows for r in part]),
                "drafted": mean([r.drafted for r in part]),
                "gained": mean([r.gained for r in part]),
                "prompt_tokens": mean([r.prefill_tokens for r in part]),
                "before_ms": mean([r.draft_s * 1e3 for r in part]),
                "forward_ms": mean([r.verify_s * 1e3 for r in part]),
                "after_ms": mean([(r.total_s - r.draft_s - r.verify_s) * 1e3 for r in part]),
            }
    outside_s = wall_s - sum(step.report.total_s for step in steps)
    figures["outside_steps_ms"] = round(outside_s / len(steps) * 1e3, 3)
    return figures


def mean(values: list[Any]) -> float:
    return round(sum(values) / len(values), 3)


def print_profile(profile: cProfile.Profile, steps: int) -> None:
    """Milliseconds a step, with and without what is called from there, for the functions that take most."""
    stats: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [(cumulative, own, calls, where) for where, (_, calls, own, cumulative, _) in stats.items()]
    print(f"\n{'total ms':>9} {'own ms':>9} {'calls':>9}  a step, under cProfile")
    for cumulative, own, calls, (file, line, name) in sorted(rows, reverse=True, key=lambda row: row[0])[:SHOWN]:
        place = f"{Path(file).parent.name}/{Path(file).name}:{line}" if line else ""
        print(f"{cumulative / steps * 1e3:9.3f} {own / steps * 1e3:9.3f} {calls / steps:9.1f}  {name} {place}")
    print(f"\n{'own ms':>9} {'calls':>9}")
    for _, own, calls, (file, line, name) in sorted(rows, reverse=True, key=lambda row: row[1])[:SHOWN]:
        place = f"{Path(file).parent.name}/{Path(file).name}:{line}" if line else ""
        print(f"{own / steps * 1e3:9.3f} {calls / steps:9.1f}  {name} {place}")


if __name__ == "__main__":
    sys.exit(main())
