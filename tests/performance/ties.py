"""Near-tie audit: where outputs depend on the batch by rounding, and how near the two likeliest tokens were there.

usage: python -m tests.performance.ties MODEL_FOLDER --prompts FILE [--n 32] [--max-tokens 128] [--weights auto]

Each prompt is answered plainly and alone, then again with speculation in a batch of 8. Where the two differ, the plain
logits at that place tell the gap of the two likeliest tokens. A flip is honest only where that is a tie: no wider than
rounding by itself moves such gaps. That is measured on the plain answers, without any draft: their tokens are fed one
by one, as plain decoding does, and all at once.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from common.config import Config, ModelConfig
from common.messages import ChatMessage, ChatPrompt
from common.sampling import Sampling, Speculation
from tests.performance import prompts as texts
from worker.assemble import Ready, assemble
from worker.cache.layout import Segment
from worker.request import Request
from worker.template import to_tokens

Array = np.ndarray[Any, Any]


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
    plain = [gaps(ready, prompt, own) for prompt, own in zip(prompts, alone, strict=True)]
    noise = max(one.noise for one in plain)
    flips = [one.by_token[common(a, b) - 1] for one, a, b in zip(plain, alone, batched, strict=True) if a != b]
    compared = sum(common(a, b) for a, b in zip(alone, batched, strict=True))
    totals = ready.engine.totals
    figures = {
        "backend": ready.facts.backend,
        "weights": ready.facts.weights_dtype,
        "tokens_compared": compared,
        "flips": len(flips),
        "flips_per_1000_tokens": round(1000 * len(flips) / max(compared, 1), 3),
        "widest_gap_of_a_flip": round(float(max(flips, default=0.0)), 6),
        "rounding_moves_gaps_by": round(float(noise), 6),
        "usual_rounding": round(float(np.median([one.usual for one in plain])), 6),
        "drafted": totals.drafted,
        "accepted": totals.accepted,
    }
    print(json.dumps(figures, indent=1))
    return int(any(gap > noise for gap in flips))


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one plain answer, between the two likeliest tokens at each place, in logits, float32 [tokens].

    `by_token`: fed one by one; `at_once`: the same two tokens, the whole answer fed in one step.
    """

    by_token: Array
    at_once: Array

    @property
    def noise(self) -> float:
        """What rounding moved a gap by at most."""
        return float(np.max(np.abs(self.by_token - self.at_once)))

    @property
    def usual(self) -> float:
        """And in half of the places."""
        return float(np.median(np.abs(self.by_token - self.at_once)))


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


def gaps(ready: Ready, prompt: list[int], answer: list[int]) -> Gaps:
    """Feed a plain answer again in two ways."""
    read = [*prompt, *answer[:-1]]
    single = [fed(ready, read[: len(prompt)], 0)[-1]]
    single += [fed(ready, [token], len(prompt) + i)[-1] for i, token in enumerate(answer[:-1])]
    ready.engine.target.clear()
    pairs = [np.argpartition(own, -2)[-2:] for own in single]
    together = fed(ready, read, 0)[len(prompt) - 1 :]
    ready.engine.target.clear()
    by_token, at_once = (
        np.array([float(np.diff(own[pair])[0]) for own, pair in zip(logits, pairs, strict=True)])
        for logits in (single, together)
    )
    sign = np.where(by_token < 0, -1.0, 1.0)
    return Gaps(by_token * sign, at_once * sign)


def fed(ready: Ready, tokens: list[int], start: int) -> Array:
    """Logits float32 [tokens, vocabulary] of the next tokens of slot 0, which has `start` already."""
    target: Any = ready.engine.target
    logits = target.forward([Segment(0, start, len(tokens), stands=True)], tokens, range(len(tokens)))
    found = np.array(logits.astype(mx.float32))
    mx.eval(target.cached_arrays())
    target.state.commit(0, start + len(tokens))
    return found


if __name__ == "__main__":
    sys.exit(main())
