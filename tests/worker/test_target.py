"""The ragged cache in mlx-lm's model classes: the model's own logits, whatever was rolled back before."""

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache

from tests.worker import families, tiny
from worker import self_test
from worker.cache.layout import Segment
from worker.cache.ragged import UnsupportedCache
from worker.cache.recurrent import states_of
from worker.target import Target


def own_logits(model: Any, prompts: list[list[int]]) -> list[mx.array]:
    return [model(mx.array([prompt]), cache=make_prompt_cache(model))[0] for prompt in prompts]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_and_rollbacks_give_the_models_own_logits(kind: str, seed: int) -> None:
    model = tiny.make_model(kind)
    source = random.Random(seed)
    prompts = [[source.randrange(tiny.VOCABULARY) for _ in range(n)] for n in (1, 40, 17, 75)]
    expected = own_logits(model, prompts)
    target, kept, checked = Target(model), [0] * len(prompts), 0
    while any(kept[row] < len(prompts[row]) for row in range(len(prompts))):
        spans = [(row, kept[row], min(source.randrange(9), len(prompts[row]) - kept[row])) for row in range(4)]
        segments = [Segment(row, start, width) for row, start, width in spans if width]
        if not segments:
            continue
        places = [(s.slot, s.start + i) for s in segments for i in range(s.width)]
        chosen = sorted(source.sample(range(len(places)), source.randrange(1, len(places) + 1)))
        logits = target.forward(segments, [prompts[row][at] for row, at in places], chosen)
        for got, place in zip(logits, chosen, strict=True):
            row, at = places[place]
            assert mx.allclose(got, expected[row][at], atol=1e-4, rtol=1e-4)
            checked += 1
        mx.eval(target.cached_arrays())
        for segment in segments:
            kept[segment.slot] = segment.start + source.randrange(segment.width + 1)
            target.state.commit(segment.slot, kept[segment.slot])
    assert checked > 20


def test_capacity_grows_and_keeps_what_was_written() -> None:
    model = tiny.make_model("llama")
    prompt = [i % tiny.VOCABULARY for i in range(700)]
    target, expected = Target(model), own_logits(model, [prompt])[0]
    for start in range(0, 700, 140):
        logits = target.forward([Segment(0, start, 140)], prompt[start : start + 140], [139])
        mx.eval(logits, target.cached_arrays())
        target.state.commit(0, start + 140)
    assert target.state.capacity_tokens >= 700
    assert mx.allclose(logits[0], expected[-1], atol=1e-3)


def test_self_test_accepts_a_model_that_works() -> None:
    model = tiny.make_model("gemma3")
    reference = self_test.reference_logits(model)
    assert self_test.check(Target(model), reference) == ""


def test_self_test_refuses_a_model_whose_logits_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    reference = self_test.reference_logits(model)
    target = Target(model)
    # Every query sees all of its slot.
    monkeypatch.setattr(
        "worker.cache.ragged.Step.mask",
        lambda _, group, window, repeats: mx.ones((group.slots, 1, repeats * group.width, group.extent), mx.bool_),
    )
    with pytest.raises(self_test.WrongLogits, match="off by"):
        self_test.check(target, reference)


def test_model_that_cannot_be_rolled_back_decodes_without_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.make_model("rwkv7")
    reference = self_test.reference_logits(model)
    monkeypatch.setattr("worker.cache.recurrent.LiveBlock.replay", lambda live, rows, tokens: states_of(live.cache))
    reason = self_test.check(Target(model), reference)
    assert "off by" in reason
    assert "rolled back" in reason


def test_self_test_refuses_a_recurrent_model_whose_states_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.make_model("mamba2")
    reference = self_test.reference_logits(model)
    monkeypatch.setattr("worker.cache.blocks.Block.is_fresh", True)
    with pytest.raises(self_test.WrongLogits, match="off by"):
        self_test.check(Target(model), reference)


def test_failure_in_a_models_own_code_is_told_with_its_reason() -> None:
    model = tiny.make_model("llama")
    reference = self_test.reference_logits(model)
    target = Target(model)
    target.caches = []
    with pytest.raises(self_test.WrongLogits, match="failed in a packed step"):
        self_test.check(target, reference)


def test_model_with_a_cache_of_another_kind_is_refused_by_its_name() -> None:
    model = tiny.make_model("llama")
    model.__class__ = type("Model", (type(model),), {"make_cache": lambda _: [ChunkedKVCache(8)] * 3})
    with pytest.raises(UnsupportedCache, match="ChunkedKVCache"):
        Target(model)


def test_model_whose_code_cannot_work_with_rows_is_refused_with_the_reason() -> None:
    model = tiny.make_model("llama")
    model.__class__ = type("Model", (type(model),), {"__module__": "mlx_lm.models.llama4"})
    with pytest.raises(UnsupportedCache, match="llama4 are not supported: its chunked attention"):
        Target(model)


def test_bytes_of_recurrent_states_are_counted_by_row() -> None:
    assert Target(tiny.make_model("llama")).measure_kv().per_row == 0
    only_states, both = Target(families.make_model("mamba2")), Target(families.make_model("falcon_h1"))
    assert only_states.measure_kv().per_token == 0
    assert only_states.measure_kv().per_row == 2 * 3 * 4 * (3 * 64 + 4 * 8 * 8)  # layers × float32 × (conv + state)
    assert both.measure_kv().per_token == 2 * 3 * 4 * 2 * 8  # keys and values × layers × float32 × heads × dim
    assert both.measure_kv().per_row > 0


def test_cleared_target_holds_no_states() -> None:
    target = Target(families.make_model("jamba"))
    mx.eval(target.forward([Segment(0, 0, 5)], [1] * 5, [4]), target.cached_arrays())
    assert target.kv_bytes > 0
    target.clear()
    assert target.kv_bytes == 0


def test_a_model_may_be_as_far_off_as_it_is_from_itself() -> None:
    model = tiny.make_model("llama")
    logits = self_test.reference_logits(model).logits
    spread = logits[0].max() - logits[0].min()
    off = [logits[0].at[3].add(0.1 * spread), *logits[1:]]
    with pytest.raises(self_test.WrongLogits, match="limit 5%"):
        self_test.check(Target(model), self_test.Reference(off))
    assert self_test.check(Target(model), self_test.Reference(off, noise=0.03)) == ""
    with pytest.raises(self_test.WrongLogits, match="limit 35%"):
        self_test.check(Target(model), self_test.Reference([logits[1], logits[0], logits[2]], noise=9.0))


def test_a_model_in_16_bits_is_read_in_two_ways() -> None:
    model = tiny.make_model("llama")
    assert self_test.reference_logits(model).noise == 0
    model.set_dtype(mx.bfloat16)
    reference = self_test.reference_logits(model)
    assert 0 <= reference.noise < 0.2
    assert self_test.check(Target(model), reference) == ""
