"""Keys and values in few bits: the same tokens with and without speculation, less memory, and clear refusals."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from common.sampling import Sampling
from tests.worker import families, tiny
from worker import self_test
from worker.assemble import _checked_target
from worker.cache.attention import CPU_STYLE, ragged_attention
from worker.cache.layout import Segment
from worker.cache.quantized import QuantizedRaggedKVCache
from worker.cache.ragged import RaggedKVCache, RaggedState, UnsupportedCache, Visibility
from worker.cache.spans import joined
from worker.request import Request
from worker.target import Target

HEADS = {"llama": 64, "gemma3": 32, "qwen3": 96}  # sizes of heads: in groups of 64, 32 and 32
SAMPLINGS = {"greedy": Sampling(), "warm": Sampling(temperature=0.7, top_p=0.9, seed=4)}


@cache
def model(kind: str) -> Any:
    return new_model(kind)


def new_model(kind: str) -> Any:
    small = tiny.make_model(kind)
    return tiny.randomized(type(small)(replace(small.args, head_dim=HEADS[kind])))


def requests(sampling: str) -> list[Request]:
    return [tiny.make_request(i, sampling=SAMPLINGS[sampling]) for i in range(8)]


@cache
def alone(kind: str, kv_bits: int, sampling: str) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = {}
    for request in requests(sampling):
        outputs |= tiny.finish(tiny.make_engine(model(kind), kv_bits=kv_bits), [tiny.plain(request)])
    return outputs


def logits_of(target: Target, prompt: list[int]) -> mx.array:
    logits = target.forward([Segment(0, 0, len(prompt))], prompt, range(len(prompt)))
    mx.eval(logits, target.cached_arrays())
    target.clear()
    return logits


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculation_in_a_joining_batch_with_prefixes_equals_plain_decoding_alone(
    kind: str, kv_bits: int, sampling: str
) -> None:
    expected = alone(kind, kv_bits, sampling)
    by_prompt = {request.prompt: expected[request.request_id] for request in requests(sampling)}
    for wrong in (0.0, 0.4, 1.0):
        oracle = tiny.Oracle(by_prompt, wrong)
        engine = tiny.make_engine(model(kind), oracle, kv_bits=kv_bits, prefix_bytes=1 << 24)
        again = [replace(request, request_id=f"again {request.request_id}") for request in requests(sampling)]
        outputs = tiny.finish(engine, [*requests(sampling), *again], random.Random(7))
        assert outputs == expected | {f"again {name}": output for name, output in expected.items()}
        assert engine.totals.drafted > 0
        assert engine.prefixes.hits > 0


def test_rounding_shows_in_the_output() -> None:
    """Else the tests above would compare nothing."""
    assert alone("llama", 4, "greedy") != alone("llama", 0, "greedy")


@pytest.mark.parametrize("kind", HEADS)
def test_eight_bits_are_near_the_unrounded_logits_and_four_bits_are_less_so(kind: str) -> None:
    prompt = [random.Random(1).randrange(tiny.VOCABULARY) for _ in range(60)]
    exact = logits_of(Target(model(kind)), prompt)
    spread = float(exact.max() - exact.min())
    errors = [float(mx.abs(logits_of(Target(model(kind), bits), prompt) - exact).max()) / spread for bits in (8, 4)]
    assert 0 < errors[0] < 0.03
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_rows_that_lose_their_slots_and_rows_that_move_keep_their_tokens(kv_bits: int) -> None:
    size = Target(model("llama"), kv_bits).measure_kv()
    engine, source = tiny.make_engine(model("llama"), kv_bits=kv_bits), random.Random(2)
    outputs: dict[str, list[int]] = {}
    for request in requests("warm"):
        engine.submit(request)
    while engine.has_work:
        kv_bytes = source.randrange(1, 9) * 256 * size.per_token
        engine.limits = replace(engine.limits, kv_bytes=kv_bytes, kv_bytes_per_token=size.per_token)
        for gain in engine.step().gains:
            outputs.setdefault(gain.request_id, []).extend(gain.tokens)
        assert engine.target.kv_bytes <= kv_bytes
    assert engine.totals.preempted > 0
    assert outputs == alone("llama", kv_bits, "warm")


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rounding_is_that_of_mlx_lm(kind: str, kv_bits: int) -> None:
    prompt = [random.Random(2).randrange(tiny.VOCABULARY) for _ in range(50)]
    fresh, size = new_model(kind), 64 if HEADS[kind] % 64 == 0 else 32
    theirs = fresh(mx.array([prompt]), cache=[c.to_quantized(size, kv_bits) for c in make_prompt_cache(fresh)])[0]
    assert mx.allclose(logits_of(Target(fresh, kv_bits), prompt), theirs, atol=1e-3)


@pytest.mark.parametrize(("kv_bits", "bytes_per_token"), [(8, 64 + 8), (4, 32 + 8), (0, 256)])
def test_a_token_takes_what_its_bits_take(kv_bits: int, bytes_per_token: int) -> None:
    """Packed integers, and a float32 scale and bias for each 64 elements; 3 layers, keys and values, 2 heads."""
    assert Target(model("llama"), kv_bits).measure_kv().per_token == 3 * 2 * 2 * bytes_per_token


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_span_is_copied_to_another_slot_as_it_is(kv_bits: int) -> None:
    prompt = [i % tiny.VOCABULARY for i in range(60)]
    target = Target(model("gemma3"), kv_bits)
    assert target.has_prefixes
    expected = logits_of(target, prompt)
    mx.eval(target.forward([Segment(0, 0, 60)], prompt, [0]), target.cached_arrays())
    span = target.extract(0, 0, 40)
    mx.eval(span.stacks)
    assert span.nbytes == 40 * target.span_bytes_per_token
    target.clear()
    target.insert(2, joined([(span, 33)]))
    logits = target.forward([Segment(2, 33, 27)], prompt[33:], range(27))
    assert mx.array_equal(logits, expected[33:])


@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_that_of_the_rounded_keys_and_values(with_sinks: bool) -> None:
    rounded, unrounded = RaggedState(CPU_STYLE), RaggedState(CPU_STYLE)
    caches = (QuantizedRaggedKVCache(rounded, None, 4), RaggedKVCache(unrounded))
    keys, values, queries = (mx.random.normal((9, heads, 1, 64), key=mx.random.key(heads)) for heads in (2, 2, 4))

    def once(array: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(array, group_size=64, bits=4), group_size=64, bits=4)

    outputs = []
    for cache_, k, v in ((caches[0], keys, values), (caches[1], once(keys), once(values))):
        cache_.state.begin([Segment(0, 0, 4), Segment(1, 0, 5)])
        slots = cache_.update_and_fetch(k, v)
        sinks = mx.array([0.5, 1.0, 0.0, 2.0]) if with_sinks else None
        outputs.append(ragged_attention(queries, *slots, cache_, 0.125, Visibility(None), sinks))
    assert mx.array_equal(*outputs)


# --- refusals -------------------------------------------------------------------------------------------------


def test_heads_that_no_group_divides_are_refused_by_name() -> None:
    small = tiny.make_model("llama")
    reference = self_test.reference_logits(small)
    with pytest.raises(UnsupportedCache, match=r"kv_bits is 8, but .* 8 elements.* set kv_bits = 0"):
        _checked_target(small, reference, 8)
    assert _checked_target(small, reference, 0)[0].measure_kv().per_token > 0


def test_another_kind_of_cache_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedCache, match=r"kv_bits is 4, but the model keeps more than .* set kv_bits = 0"):
        Target(families.make_model("deepseek_v3"), 4)


def test_a_model_that_looks_into_its_cache_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = new_model("llama")
    reference = self_test.reference_logits(fresh)
    attention = type(fresh.model.layers[0].self_attn)
    original = attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        output = original(self, x, mask, cache)
        return output if not isinstance(cache, QuantizedRaggedKVCache) else output + cache.keys

    monkeypatch.setattr(attention, "__call__", call)
    with pytest.raises(UnsupportedCache, match=r"kv_bits is 8, but this model does not work .*keys.* set kv_bits = 0"):
        _checked_target(fresh, reference, 8)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_self_test_accepts_rounded_keys_and_values(kv_bits: int) -> None:
    for kind in HEADS:
        fresh = new_model(kind)
        target, _ = _checked_target(fresh, self_test.reference_logits(fresh), kv_bits)
        assert isinstance(target.caches[0], QuantizedRaggedKVCache)
