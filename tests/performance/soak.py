"""Many clients with requests of every kind for some minutes: is each answer that of the request alone, is memory flat?

usage: python -m tests.performance.soak [--minutes 10] [--clients 100] [--questions 80] [--prompts FILE] [--model DIR]

Requests differ in length, sampling and drafter and come again and again, in ever other company. Afterwards each is
asked once more, alone and without speculation. Texts that differ are shown: with a BLAS whose sums depend on the
batch they may, at near ties (see tests/performance/ties.py).
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import paths
from tests.e2e.server import Serve
from tests.performance import prompts as texts
from tests.performance.bench import DEMO_MODEL
from tests.performance.load import Answer, Server, ask, chat, open_session

SAMPLINGS: Sequence[dict[str, Any]] = (
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0, "logit_bias": {"198": -2.0}},
)
DRAFTERS: Sequence[Any] = (True, "suffix", "head", "ngram", "combo", False, "layers")
LENGTHS = 4, 48  # tokens of an answer, least and most
MEMORY_EVERY_S = 5.0


@dataclass(slots=True)
class Soak:
    """What came back: the texts of each body's answers, what went wrong, and the workers' bytes by time."""

    answers: dict[int, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def take(self, number: int, answer: Answer) -> None:
        """One more answer to body `number`."""
        if answer.error:
            self.errors.append(answer.error)
        else:
            self.answers.setdefault(number, []).append(answer.text)


def main() -> int:
    options = parse()
    bodies = requests(options)
    serve = Serve(options.model, env={"MAX_BATCH_SIZE": str(options.clients)})
    try:
        serve.wait_ready()
        server = Server("mlxspec", serve.url, serve.model)
        soak = asyncio.run(soaked(serve, server, bodies, options.clients, options.minutes * 60))
        print(f"{sum(map(len, soak.answers.values()))} answers to {len(soak.answers)} requests", flush=True)
        alone = asyncio.run(answered_alone(server, bodies))
    finally:
        serve.close()
    return report(soak, alone)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--prompts", type=Path, help='JSON lines with "turns"; default: a few of our own')
    parser.add_argument("--max-chars", type=int, default=600)
    parser.add_argument("--model", type=Path, default=paths.models_dir() / DEMO_MODEL)
    return parser.parse_args()


def requests(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bodies, each a function of its number."""
    known = texts.read(options.prompts, options.max_chars) if options.prompts else texts.PROMPTS
    source, bodies = random.Random(0), []
    for number in range(options.questions):
        drafter = DRAFTERS[number % len(DRAFTERS)]
        speculative = {"drafter": drafter} if isinstance(drafter, str) else drafter
        fields = {**SAMPLINGS[number % len(SAMPLINGS)], "seed": number, "speculative": speculative}
        bodies.append(chat(known[number * len(known) // options.questions], source.randint(*LENGTHS), **fields))
    return bodies


async def soaked(serve: Serve, server: Server, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Soak:
    """All bodies again and again, in ever other order, for so long."""
    soak, order = Soak(), random.Random(1)
    ends = time.monotonic() + seconds

    async def client(session: Any) -> None:
        while time.monotonic() < ends:
            number = order.randrange(len(bodies))
            answer = Answer()
            await ask(session, server, bodies[number], answer)
            soak.take(number, answer)

    async def watch() -> None:
        while time.monotonic() < ends:
            soak.memory.append(sum(one.memory_info().rss for one in serve.children_named("worker")))
            await asyncio.sleep(MEMORY_EVERY_S)

    async with open_session() as session:
        await asyncio.gather(watch(), *(client(session) for _ in range(clients)))
    return soak


async def answered_alone(server: Server, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Each once more, one after the other, decoded plainly."""
    answers = [Answer() for _ in bodies]
    async with open_session() as session:
        for body, answer in zip(bodies, answers, strict=True):
            await ask(session, server, {**body, "speculative": False}, answer)
    return answers


def report(soak: Soak, alone: Sequence[Answer]) -> int:
    """Prints what was found; 1 if an answer differs, failed, or memory grew by more than a tenth."""
    different = 0
    for number, found in sorted(soak.answers.items()):
        others = [text for text in found if text != alone[number].text]
        different += len(others)
        if others:
            print(
                f"request {number}: {len(others)} of {len(found)} differ: {others[0]!r}, alone {alone[number].text!r}"
            )
    settled = soak.memory[len(soak.memory) // 4 :]  # the first quarter fills the prefix cache
    third = max(len(settled) // 3, 1)
    first, last = (statistics.median(part) for part in (settled[:third], settled[-third:]))
    failed = [*soak.errors, *(answer.error for answer in alone if answer.error)]
    print(f"{different} answers differ from those alone, {len(failed)} errors {failed[:3]}")
    print(f"workers' memory after a quarter {first / 1e6:.0f} MB, at the end {last / 1e6:.0f} MB")
    return 1 if different or failed or last > 1.1 * first else 0


if __name__ == "__main__":
    sys.exit(main())
