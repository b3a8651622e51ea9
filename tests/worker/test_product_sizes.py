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
from worker.product_sizes import blocked
from worker.request import Request

BLOCKED = blocked([2], [4])
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


@pytest.mark.parametrize(
    ("faster", "small", "sizes"),
    [
        ([], [], [1, 8, 8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16]),
        ([2], [2, 4], [1, 2, 3, 4, 8, 8, 8, 8, 9, 10, 16, 16, 16, 16, 16, 16]),
        ([2, 4], [2], [1, 2, 8, 8, 8, 8, 8, 8, 9, 10, 11, 12, 16, 16, 16, 16]),
        ([6], [2, 4, 6], [1, 2, 3, 4, 5, 6, 8, 8, 13, 13, 13, 13, 13, 14, 16, 16]),
    ],
)
def test_a_step_is_padded_to_a_whole_block_where_less_is_no_faster(
    faster: list[int], small: list[int], sizes: list[int]
) -> None:
    found = blocked(faster, small)
    assert [found.padded(tokens) for tokens in range(1, 17)] == [sizes[n - 1] for n in range(1, 17)]
    assert [found.padded(tokens) for tokens in (63, 64, 65, 2000)] == [64, 64, 65, 2000]


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ({10: 0.9, 12: 1.1, 14: 1.6}, [9, 10, 16, 16, 16, 16, 16, 16]),
        ({10: 0.7, 12: 0.8, 14: 1.3}, [9, 10, 11, 12, 16, 16, 16, 16]),
        ({10: 0.97, 12: 0.98, 14: 0.99}, [16] * 8),
        ({10: 0.7, 12: 0.8, 14: 0.9}, list(range(9, 17))),
        ({2: 1.1, 4: 1.2, 6: 1.3}, [1] + 7 * [8]),
        ({2: 0.9, 4: 1.04, 6: 1.3}, [1, 2, 3, 4, 8, 8, 8, 8]),
    ],
)
def test_which_sizes_are_padded_is_measured(seconds: dict[int, float], sizes: list[int]) -> None:
    calls = iter(range(1000))

    def run(tokens: int) -> float:
        return 99.0 if next(calls) % 36 < 4 else seconds.get(tokens, 1.0)  # the first ones of each kind warm up

    found = product_sizes.chosen(run)
    first = 9 if max(seconds) > 8 else 1
    assert [found.padded(tokens) for tokens in range(first, first + 8)] == sizes


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
