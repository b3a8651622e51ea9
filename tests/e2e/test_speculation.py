"""Speculation on the real model changes no token: over HTTP, and in the engine alone, where it is exact to the bit."""

import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from common.sampling import Sampling
from tests.e2e.server import Serve
from tests.worker import tiny
from worker import backend, loader
from worker.request import Request

# --- over HTTP, with whatever BLAS the server has -------------------------------------------------------

# Texts that continue themselves, so that drafts are found and accepted.
COUNTING = "one two three four five six seven eight. one two three four five six seven eight. one two three"
CODE = "x = load('a')\nsave(x, 'a')\nx = load('b')\nsave(x, 'b')\nx = load('c')\nsave(x, 'c')\nx = load('d')\n"
SONG = "Row, row, row your boat, gently down the stream. Row, row, row your boat, gently down the"
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 5},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_text_over_http_is_the_same_with_and_without_speculation(server: Serve, sampling: str) -> None:
    """Short texts: OpenBLAS rounds differently at each batch width, which may flip a token after hundreds."""
    accepted = 0
    for prompt in (COUNTING, CODE, SONG):
        body = {"prompt": prompt, "raw": True, "max_tokens": 28, **SAMPLINGS[sampling]}
        status, plain = server.request("POST", "/generate", {**body, "speculative": False})
        assert status == 200, plain
        status, fast = server.request("POST", "/generate", {**body, "speculative": True})
        assert status == 200, fast
        assert fast["text"] == plain["text"]
        assert fast["finish_reason"] == plain["finish_reason"]
        assert fast["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        assert plain["speculative_stats"]["enabled"] is False
        assert plain["speculative_stats"]["draft_tokens"] == 0
        stats = fast["speculative_stats"]
        assert stats["enabled"] is True
        own = fast["usage"]["completion_tokens"] - stats["accepted_tokens"]
        assert stats["steps"] - own in (0, 1)  # a step whose draft reaches the text's end adds no token of its own
        accepted += stats["accepted_tokens"]
    assert accepted > 0


def test_chat_text_is_the_same_with_and_without_speculation(server: Serve) -> None:
    question = f"Repeat this text word for word: {SONG} stream."
    body = {"prompt": question, "max_tokens": 24, "temperature": 0}
    plain = server.request("POST", "/generate", {**body, "speculative": False})[1]
    fast = server.request("POST", "/generate", {**body, "speculative": {"drafter": "ngram", "max_draft_tokens": 4}})[1]
    assert fast["text"] == plain["text"]


# --- in this process, with the wheel's own BLAS: independent of batch and width, to the bit, and slow ---------

PROMPTS = [
    "yes no yes no yes no yes no yes no",
    "The cat sat on the mat. The cat sat",
    "a, b, c, d, a, b, c, d, a, b,",
    "My favourite colour is",
]
NEW_TOKENS = 7
IN_PROCESS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, seed=3)}


@cache
def loaded(folder: Path) -> loader.Loaded:
    backend.prepare()
    return loader.load(str(folder), "float32")


def requests(model: loader.Loaded, sampling: Sampling) -> list[Request]:
    return [
        Request(
            request_id=f"r{number}",
            prompt=tuple(model.tokenizer.encode(prompt)),
            sampling=sampling,
            max_tokens=NEW_TOKENS,
        )
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def model(demo_model: Path) -> loader.Loaded:
    assert "openblas" not in os.environ.get("LD_PRELOAD", ""), "OpenBLAS depends on batch and width; run without it"
    return loaded(demo_model)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sampling", IN_PROCESS)
def test_speculation_in_a_joining_batch_equals_plain_decoding_alone(model: loader.Loaded, sampling: str) -> None:
    batch = requests(model, IN_PROCESS[sampling])
    expected: dict[str, list[int]] = {}
    for request in batch:
        expected |= tiny.finish(tiny.make_engine(model.model), [tiny.plain(request)])
    engine = tiny.make_engine(model.model)
    assert tiny.finish(engine, batch, random.Random(1)) == expected
    assert engine.totals.accepted > 0
    if sampling == "greedy":
        for request in batch:
            theirs = generate_step(mx.array(request.prompt), model.model, max_tokens=NEW_TOKENS)
            assert [int(token) for token, _ in theirs] == expected[request.request_id]
