"""Near-tie audit: where outputs depend on the batch by rounding, and how near the two likeliest tokens were there.

usage: python -m tests.performance.ties MODEL_FOLDER --prompts FILE [--n 32] [--max-tokens 128] [--weights auto]

Each prompt is answered plainly and alone, then again with speculation in a batch of 8. Where the two differ, the
plain logits at that place tell the gap of the two likeliest tokens: a flip is honest only where it is a tie.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from common.config import Config, ModelConfig
from common.messages import ChatMessage, ChatPrompt
from common.sampling import Sampling, Speculation
from tests.performance import prompts as texts
from worker.assemble import Ready, assemble
from worker.cache.layout import Segment
from worker.request import Request
from worker.template import to_tokens

EPSILON = 0.01  # of logits in float32: a wider gap cannot be rounding …
UNITS = 2.0  # … nor can one of more units in the last place of logits in 16 bits


def main() -> int:
    options = parse()
    ready = assemble(str(options.model), Config(), ModelConfig(path=str(options.model), weights=options.weights))
    chosen = texts.spread(texts.read(options.prompts, options.max_chars), options.n)
    prompts = [chat_tokens(ready, prompt) for prompt in chosen]
    alone: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        alone += answers(ready, [request(number, prompt, options.max_tokens, "none")])
    batched: list[list[int]] = []
    for start in range(0, len(prompts), 8):
        part = list(enumerate(prompts))[start : start + 8]
        batched += answers(ready, [request(i, prompt, options.max_tokens, "auto") for i, prompt in part])
    gaps = [gap(ready, prompts[i], alone[i], batched[i]) for i in range(len(prompts)) if alone[i] != batched[i]]
    compared = sum(common(a, b) for a, b in zip(alone, batched, strict=True))
    totals = ready.engine.totals
    figures = {
        "backend": ready.facts.backend,
        "weights": ready.facts.weights_dtype,
        "tokens_compared": compared,
        "flips": len(gaps),
        "flips_per_1000_tokens": round(1000 * len(gaps) / max(compared, 1), 3),
        "widest_gap": max((one.logits for one in gaps), default=0.0),
        "widest_gap_in_last_places": max((one.units for one in gaps), default=0.0),
        "drafted": totals.drafted,
        "accepted": totals.accepted,
    }
    print(json.dumps(figures, indent=1))
    return int(not all(one.is_tie for one in gaps))


@dataclass(frozen=True, slots=True)
class Gap:
    """Between the two likeliest logits, and in units in the last place of the larger one."""

    logits: float
    units: float

    @property
    def is_tie(self) -> bool:
        return self.logits <= EPSILON or self.units <= UNITS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--max-chars", type=int, default=900)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--weights", default="auto")
    return parser.parse_args()


def chat_tokens(ready: Ready, prompt: str) -> list[int]:
    chat = ChatPrompt(messages=(ChatMessage(role="user", content=prompt),), plain_fallback=True)
    return list(to_tokens(chat, ready.tokenizer, ready.facts.vocabulary))


def request(number: int, prompt: list[int], max_tokens: int, drafter: str) -> Request:
    return Request(
        request_id=str(number),
        prompt=tuple(prompt),
        sampling=Sampling(),
        max_tokens=max_tokens,
        speculation=Speculation(drafter=drafter),
    )


def answers(ready: Ready, requests: list[Request]) -> list[list[int]]:
    engine = ready.engine
    outputs: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        engine.submit(one)
    while engine.has_work:
        for gain in engine.step().gains:
            outputs[gain.request_id] += gain.tokens
    return list(outputs.values())


def common(a: list[int], b: list[int]) -> int:
    """Tokens up to and with the first that differs."""
    return next((i + 1 for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def gap(ready: Ready, prompt: list[int], alone: list[int], batched: list[int]) -> Gap:
    """Of the logits where the answers part."""
    tokens = [*prompt, *alone[: common(alone, batched) - 1]]
    target: Any = ready.engine.target
    target.clear()
    logits = target.forward([Segment(0, 0, len(tokens), True)], tokens, [len(tokens) - 1])[0]
    second, first = mx.sort(logits.astype(mx.float32))[-2:].tolist()
    target.clear()
    unit = mx.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(abs(first)))
    return Gap(first - second, (first - second) / unit)


if __name__ == "__main__":
    sys.exit(main())
