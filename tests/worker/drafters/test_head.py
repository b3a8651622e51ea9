"""The `head` drafter reads behind the target, drafts what its head predicts, and keeps its slots in order."""

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from common.sampling import Sampling
from tests.worker import tiny
from worker.drafters.drafter import Ask, Draft
from worker.drafters.head import HeadDrafter, Piece, Reading
from worker.engine import Engine
from worker.heads.head import Head
from worker.taps import Taps
from worker.target import Target


class Recorded(HeadDrafter):
    """Remembers what it drafted, and behind which tokens."""

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        drafts = super().draft(asks)
        for ask, draft in zip(asks, drafts, strict=True):
            self.made.append((list(ask.row.tokens), draft))
        return drafts

    made: list[tuple[list[int], Draft]]


def engine_with(model: Any, head: Head, **options: Any) -> tuple[Engine, Recorded]:
    def make(target: Target) -> Recorded:
        drafter = Recorded(target, head, tiny.cheap_times(), tiny.VOCABULARY)
        drafter.made = []
        return drafter

    engine = tiny.make_engine(model, make, **options)
    drafter = engine.drafting.drafters["head"]
    assert isinstance(drafter, Recorded)
    return engine, drafter


def predicted(kind: str, tokens: Sequence[int], length: int) -> list[int]:
    """What a head drafts behind these tokens, by definition: all of it computed anew for each token."""
    model = tiny.make_model(kind)
    head = tiny.make_head(model)
    taps = Taps(model, head.config.taps)
    model(mx.array([list(tokens[:-1])]))
    features = head.fuse(taps.take())
    known, drafted = list(tokens), []
    for _ in range(length):
        hidden = head(features, head.embed(mx.array([known[1:]])), mask="causal")
        drafted.append(int(head.vocabulary[mx.argmax(head.logits(hidden)[0, -1])]))
        features = mx.concatenate([features, hidden[:, -1:]], axis=1)
        known.append(drafted[-1])
    return drafted


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
def test_drafts_are_what_the_head_predicts_from_all_tokens_before(kind: str, prefix_bytes: int) -> None:
    model = tiny.make_model(kind)
    engine, drafter = engine_with(model, tiny.make_head(model), prefix_bytes=prefix_bytes)
    requests = [tiny.make_request(i, max_tokens=12) for i in range(4)]
    tiny.finish(engine, requests, random.Random(1))
    assert len(drafter.made) > 20
    for tokens, draft in random.Random(2).sample(drafter.made, 12):
        assert draft.pending is not None
        assert draft.pending.tolist() == predicted(kind, tokens, draft.length)


def test_a_row_that_was_preempted_or_shares_a_prefix_drafts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    engine, drafter = engine_with(model, tiny.make_head(model), prefix_bytes=1 << 22)
    prompt = tuple(random.Random(5).randrange(tiny.VOCABULARY) for _ in range(150))
    first = tiny.make_request(0, prompt=prompt, max_tokens=10)
    tiny.finish(engine, [first])
    drafter.made.clear()
    engine.submit(tiny.make_request(1, prompt=(*prompt, 3, 4, 5), max_tokens=10))
    for _ in range(4):
        engine.step()
    assert engine.prefixes.hits == 1
    engine._preempt(engine.rows[0], 0.0)
    while engine.has_work:
        engine.step()
    # The entry at the end of a shared prefix was made with the token that came after it in the first row.
    right = [draft.pending.tolist() == predicted("llama", tokens, draft.length) for tokens, draft in drafter.made]
    assert len(right) > 3 and sum(right) >= len(right) // 2


def test_slots_that_move_take_their_readings_along() -> None:
    model = tiny.make_model("llama")
    engine, drafter = engine_with(model, tiny.make_head(model))
    for i in range(4):
        engine.submit(tiny.make_request(i, max_tokens=6 if i < 3 else 25, prompt=tuple(range(10 + i))))
    while len(engine.rows) != 1 or engine.waiting:
        engine.step()
    row = engine.rows[0]
    engine.target.rearrange([row.slot])
    engine.drafting.rearrange([row.slot])
    row.slot = 0
    drafter.made.clear()
    while engine.has_work:
        engine.step()
    assert drafter.made
    for tokens, draft in drafter.made:
        assert draft.pending.tolist() == predicted("llama", tokens, draft.length)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=4)])
def test_long_prompts_are_read_in_parts(sampling: Sampling) -> None:
    model = tiny.make_model("llama")
    prompt = tuple(random.Random(6).randrange(tiny.VOCABULARY) for _ in range(700))
    request = tiny.make_request(0, prompt=prompt, max_tokens=8, sampling=sampling)
    expected = tiny.finish(tiny.make_engine(model), [tiny.plain(request)])
    engine, drafter = engine_with(model, tiny.make_head(model))
    assert tiny.finish(engine, [request]) == expected
    assert drafter.made


def test_a_reading_forgets_what_did_not_stand() -> None:
    reading = Reading(0)
    reading.add(Piece(0, 5, 0, ()))
    reading.add(Piece(5, 9, 3, ()))
    assert [(p.start, p.end, p.first) for p in reading.take(6)] == [(0, 5, 0), (5, 6, 3)]
    reading.add(Piece(6, 7, 0, ()))  # of four tokens only one stood
    assert [(p.start, p.end, p.first) for p in reading.take(7)] == [(6, 7, 0)]
    assert [(p.start, p.end, p.first) for p in reading.take(7)] == [(6, 7, 0)], "the last one can be read again"
