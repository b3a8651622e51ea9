"""Steps padded to whole blocks of tokens: where that pays, and that outputs are those of steps that are not padded."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from common.sampling import Sampling
from tests.worker import tiny
from worker import product_sizes
from worker.cache.layout import UNPADDED
from worker.product_sizes import BLOCKED
from worker.request import Request

WARM = Sampling(temperature=0.7, seed=11)
DRAFTERS: dict[str, Callable[[str], Any]] = {
    "half": lambda kind: tiny.Oracle({r.prompt: alone(kind, 0)[r.request_id] for r in requests()}, wrong=0.4),
    "twin": lambda kind: tiny.model_drafter(tiny.make_model(kind)),
    "layers": lambda kind: tiny.layers_drafter((0, 1)),
    "healed": lambda kind: tiny.healed_drafter(model(kind)),
    "head": lambda kind: tiny.head_drafter(model(kind)),
}


@cache
def model(kind: str) -> Any:
    return tiny.make_model(kind)


def requests() -> list[Request]:
    return [tiny.make_request(i, sampling=WARM) for i in range(8)]


@cache
def alone(kind: str, kv_bits: int) -> dict[str, list[int]]:
    """Plain decoding, one request after the other, of steps that are not padded."""
    outputs: dict[str, list[int]] = {}
    for request in requests():
        outputs |= tiny.finish(tiny.make_engine(model(kind), kv_bits=kv_bits), [tiny.plain(request)])
    return outputs


def test_a_step_is_padded_to_a_block_that_is_nearly_filled() -> None:
    assert [BLOCKED.padded(tokens) for tokens in range(1, 17)] == [
        1,
        2,
        3,
        4,
        8,
        8,
        8,
        8,
        9,
        10,
        11,
        12,
        16,
        16,
        16,
        16,
    ]
    assert [BLOCKED.padded(tokens) for tokens in (63, 64, 65, 2000)] == [64, 64, 65, 2000]


@pytest.mark.parametrize(("whole_s", "sizes"), [(0.8, BLOCKED), (1.2, UNPADDED)])
def test_steps_are_padded_where_whole_blocks_are_no_slower_than_a_little_less(whole_s: float, sizes: Any) -> None:
    calls = iter(range(1000))

    def run(tokens: int) -> float:
        return 99.0 if next(calls) < 2 else whole_s if tokens == 16 else 1.0  # the first ones warm up

    assert product_sizes.chosen(run) is sizes


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_sizes, "worthwhile", lambda: BLOCKED)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("drafting", DRAFTERS)
def test_padded_steps_give_the_tokens_of_plain_decoding(kind: str, drafting: str, padded: None) -> None:
    expected = alone(kind, 0)
    engine = tiny.make_engine(model(kind), DRAFTERS[drafting](kind))
    assert engine.target.state.sizes is BLOCKED
    assert tiny.finish(engine, requests(), random.Random(7)) == expected
    assert engine.totals.drafted > 0


def test_padded_steps_with_a_quantized_cache_give_the_tokens_of_plain_decoding(
    padded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tiny.randomized(type(model("llama"))(replace(model("llama").args, head_dim=64)))
    engine = tiny.make_engine(wide, kv_bits=8)
    assert engine.target.state.sizes is BLOCKED
    found = tiny.finish(engine, requests(), random.Random(7))
    monkeypatch.undo()
    for request in requests():
        plain = tiny.make_engine(wide, kv_bits=8)
        assert plain.target.state.sizes is UNPADDED
        assert tiny.finish(plain, [tiny.plain(request)]) == {request.request_id: found[request.request_id]}
