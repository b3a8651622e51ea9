"""Steps whose attention serves each token by itself: padded, compiled, and the same tokens as ever."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from common.sampling import Sampling
from tests.worker import tiny
from worker import calibration, slots
from worker.cache import attention, token_attention
from worker.cache.layout import FEW_SHAPES, Segment, padded_places, padded_tokens
from worker.cache.token_attention import Rotary
from worker.scheduler import Limits
from worker.target import Target

LONG = 1100  # tokens of a prompt that attend in groups


def by_definition(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    slots: mx.array,
    positions: mx.array,
    scale: float,
    window: int | None,
) -> mx.array:
    """What the kernel computes, in plain operations: every token with a copy of its whole slot."""
    at, query = mx.arange(keys.shape[2])[None, :], positions[:, None]
    seen = (at <= query) & (at > query - window) if window else at <= query
    return mx.fast.scaled_dot_product_attention(
        queries, keys[slots], values[slots], scale=scale, mask=seen[:, None, None, :]
    )


def taken_in_by_definition(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    pools: Sequence[mx.array],
    slots: mx.array,
    positions: mx.array,
    rotary: Rotary | None,
) -> tuple[mx.array, list[mx.array]]:
    """The same of the kernel that writes."""
    if rotary is not None:
        queries, keys = (
            mx.fast.rope(
                x,
                rotary.dims,
                traditional=rotary.is_traditional,
                base=None,
                scale=1.0,
                offset=positions,
                freqs=1.0 / rotary.rates,
            )
            for x in (queries, keys)
        )
    written = [mx.array(pool) for pool in pools]
    for pool, new in zip(written, (keys, values), strict=True):
        pool[slots[:, None], mx.arange(new.shape[1])[None], positions[:, None]] = new[:, :, 0]
    return queries, written


@pytest.fixture
def by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_STYLE", replace(attention.CPU_STYLE, by_token=True))
    monkeypatch.setattr(token_attention, "is_usable", lambda form: True)
    monkeypatch.setattr(token_attention, "attention", by_definition)
    monkeypatch.setattr(token_attention, "taken_in", taken_in_by_definition)


@pytest.fixture
def compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether functions are compiled: on a CPU a C++ compiler takes a second for each shape."""
    (mx.enable_compile if request.param else mx.disable_compile)()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    ("kind", "compiling"),
    [("llama", True), *((kind, False) for kind in tiny.KINDS)],
    indirect=["compiling"],
)
def test_steps_by_token_give_the_tokens_of_plain_decoding(kind: str, compiling: None, by_token: None) -> None:
    samplings = [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=5)]
    requests = [tiny.make_request(i, sampling=samplings[i % 2]) for i in range(8)]
    model = tiny.make_model(kind)
    expected: dict[str, list[int]] = {}
    for request in requests:
        expected |= tiny.finish(tiny.make_engine(model), [tiny.plain(request)])
    engine = tiny.make_engine(model, tiny.Oracle({r.prompt: expected[r.request_id] for r in requests}, wrong=0.4))
    assert engine.target.state.is_by_token
    assert tiny.finish(engine, requests, random.Random(3)) == expected


def test_logits_are_those_of_grouped_attention(monkeypatch: pytest.MonkeyPatch, by_token: None) -> None:
    def logits(target: Target) -> Any:
        target.forward([Segment(0, 0, 5, True), Segment(2, 0, 3, True)], list(range(8)), [4, 7])
        target.state.commit(0, 5)
        target.state.commit(2, 3)
        return target.forward([Segment(0, 5, 3), Segment(2, 3, 2)], [9, 8, 7, 6, 5], range(5))

    compiled = logits(Target(tiny.make_model("llama")))
    monkeypatch.undo()
    plain = Target(tiny.make_model("llama"))
    assert not plain.state.is_by_token
    assert mx.allclose(compiled, logits(plain), atol=1e-4)


def test_pools_that_are_written_in_place_wait_for_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads for later alone, as a head does, drops the queries."""
    monkeypatch.setattr(token_attention, "_take_in", lambda: lambda inputs, **_: [mx.erf(inputs[0])])
    x, pools = mx.ones((2, 1, 1, 64)), [mx.zeros((1, 1, 8, 64)), mx.ones((1, 1, 8, 64))]
    places = mx.array([0, 1], dtype=mx.int32)
    _, written = token_attention.taken_in(x, x, x, pools, places, places, None)
    for pool in written:
        mx.export_to_dot(str(tmp_path / "graph.dot"), pool)
        assert "Erf" in (tmp_path / "graph.dot").read_text()
    assert all(mx.array_equal(pool, given) for given, pool in zip(pools, written, strict=True))


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "rope",
    [nn.RoPE(4), nn.RoPE(8, traditional=True, base=500.0, scale=0.5), Llama3RoPE(8, scaling_config=SCALING), None],
)
def test_rotary_embeddings_are_made_where_keys_are_written(
    rope: Any, monkeypatch: pytest.MonkeyPatch, by_token: None
) -> None:
    """`rope` None: the second layer has none. The same layers go on with attention in groups: a long prompt."""

    def logits(target: Target) -> Any:
        target.forward([Segment(0, 0, 5, True), Segment(2, 0, 3, True)], list(range(8)), [4, 7])
        target.state.commit(0, 5)
        target.state.commit(2, 3)
        target.forward([Segment(1, 0, LONG, True)], [token % 90 for token in range(LONG)], [0])
        target.state.commit(1, LONG)
        return target.forward([Segment(0, 5, 3), Segment(1, LONG, 2)], [9, 8, 7, 6, 5], range(5))

    def changed() -> Any:
        model = tiny.make_model("llama")
        for i, layer in enumerate(model.layers):
            if rope is not None or i == 1:
                layer.self_attn.rope = rope or (lambda x, offset=0: x)
        return model

    mx.disable_compile()
    try:
        fused = Target(changed())
        assert fused.state.is_fused
        got = logits(fused)
        assert not fused.state.begin([Segment(2, 3, LONG, True)]).is_fused
        monkeypatch.undo()
        plain = Target(changed())
        assert not plain.state.is_fused
        assert mx.allclose(got, logits(plain), atol=1e-4)
    finally:
        mx.enable_compile()


def test_padding_adds_less_than_half() -> None:
    for tokens in range(1, 5000):
        assert tokens <= padded_tokens(tokens) < tokens * 1.5
        assert FEW_SHAPES.padded(tokens) == padded_tokens(tokens)
    assert len({padded_tokens(tokens) for tokens in range(1, 1025)}) == 20


def test_chosen_tokens_have_few_shapes_beside_those_of_all() -> None:
    for tokens in (1, 6, 24, 512):
        shapes = {padded_places(chosen, tokens) for chosen in range(tokens + 1)}
        assert max(shapes) == tokens and len(shapes) <= 1 + tokens.bit_length() // 2
        assert all(chosen <= padded_places(chosen, tokens) < max(4 * chosen, 4) for chosen in range(tokens + 1))


def test_slots_are_roomy_where_that_is_little_of_the_memory(by_token: None) -> None:
    target = Target(tiny.make_model("llama"))
    assert target.state.sized_for(0, 5) == (1, 256)  # nobody has said how much memory there is
    slots.limit(target, limits(kv_bytes=4 * 8 * 2048))
    assert target.state.sized_for(0, 5) == (8, 2048)
    assert target.state.sized_for(0, 2050)[0] == 1  # that would be more than a quarter
    slots.limit(target, limits(kv_bytes=4 * 8 * 600))
    assert target.state.sized_for(0, 5) == (8, 512)
    slots.limit(target, limits(kv_bytes=8 * 600))
    assert target.state.sized_for(0, 5) == (1, 256)


def test_rows_go_on_when_there_is_no_memory_for_roomy_slots_any_more(by_token: None) -> None:
    requests = [tiny.make_request(i) for i in range(4)]
    model = tiny.make_model("llama")
    mx.disable_compile()
    try:
        expected = tiny.finish(tiny.make_engine(model, rows=4), requests)
        engine = tiny.make_engine(model, rows=4)
        for request in requests:
            engine.submit(request)
        outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        shapes = []
        while engine.has_work:
            for gain in engine.step().gains:
                outputs[gain.request_id] += gain.tokens
            shapes.append((engine.target.state.slots, engine.target.state.capacity_tokens))
            engine.set_kv_limit(2 * 256 if len(shapes) > 2 else 1 << 30)
    finally:
        mx.enable_compile()
    assert outputs == expected
    assert shapes[0] == (4, 2048) and (2, 256) in shapes and engine.totals.preempted >= 2


def test_slots_are_as_small_as_can_be_where_shapes_do_not_matter() -> None:
    target = Target(tiny.make_model("llama"))
    slots.limit(target, limits(kv_bytes=1 << 30))
    assert target.state.sized_for(2, 5) == (4, 256)


def limits(kv_bytes: int) -> Limits:
    return Limits(rows=8, waiting=8, kv_bytes=kv_bytes, kv_bytes_per_token=1)


def test_a_step_of_each_usual_size_is_compiled_at_load(
    by_token: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "LARGEST_COMPILED", 4)  # a C++ compiler takes a second for each on a CPU
    monkeypatch.setattr(calibration, "LARGEST", 4)
    target = Target(tiny.make_model("llama"))
    slots.limit(target, limits(kv_bytes=1 << 30))
    calibration.measured_times(target, "tiny", "float32")
    compiled = target.compiled_shapes
    for tokens in (1, 2, 3, 4):
        target.forward([Segment(row, 0, 1) for row in range(tokens)], [1] * tokens, range(tokens))
    assert target.compiled_shapes == compiled


def test_one_long_prompt_goes_through_matrix_products(by_token: None) -> None:
    target = Target(tiny.make_model("llama"))
    assert target.state.begin([Segment(0, 0, 8, True)]).is_by_token
    assert not target.state.begin([Segment(0, 0, 1025, True)]).is_by_token
