"""Log-probabilities: the model's own, the same with and without speculation, for those who ask."""

import math
import random
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from common.sampling import MAX_TOP_LOGPROBS, Sampling
from tests.worker import tiny
from worker.request import Request
from worker.sampling.logprobs import Logprob, measure

PENALIZED = Sampling(
    temperature=0.8, seed=4, top_p=0.9, repetition_penalty=1.4, frequency_penalty=0.5, logit_bias=((3, 4.0),)
)


@cache
def model() -> Any:
    return tiny.make_model("llama")


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = largest + math.log(sum(math.exp(value - largest) for value in logits))
    return [value - total for value in logits]


def random_logits(rows: int, vocabulary: int) -> list[list[float]]:
    source = random.Random(vocabulary)
    return [[source.gauss(0, 3) for _ in range(vocabulary)] for _ in range(rows)]


@pytest.mark.parametrize("vocabulary", [5, 50])
def test_values_are_those_of_the_log_softmax_best_first(vocabulary: int) -> None:
    logits, tokens = random_logits(4, vocabulary), [1, 0, 4, 2]
    found = measure(mx.array(logits), mx.array(tokens), [3, None, 0, MAX_TOP_LOGPROBS]).read()
    assert found[1] is None
    for row, token, logprob, count in zip(logits, tokens, found, [3, 0, 0, MAX_TOP_LOGPROBS], strict=True):
        if logprob is None:
            continue
        expected = log_softmax(row)
        best = sorted(range(vocabulary), key=lambda i: -row[i])[:count]
        assert logprob.logprob == pytest.approx(expected[token], abs=1e-5)
        assert [token for token, _ in logprob.top] == best
        assert [value for _, value in logprob.top] == pytest.approx([expected[i] for i in best], abs=1e-5)


def test_all_alternatives_of_a_small_vocabulary_have_probability_one() -> None:
    (found,) = measure(mx.array(random_logits(1, 7)), mx.array([0]), [MAX_TOP_LOGPROBS]).read()
    assert found is not None
    assert sum(math.exp(value) for _, value in found.top) == pytest.approx(1.0, abs=1e-5)


def test_what_a_row_gets_does_not_depend_on_what_others_ask() -> None:
    logits, tokens = mx.array(random_logits(3, 60)), mx.array([5, 6, 7])
    alone = measure(logits[1:2], tokens[1:2], [4]).read()[0]
    for others in ([None, 4, None], [20, 4, 1], [0, 4, 0]):
        assert measure(logits, tokens, others).read()[1] == alone


def test_nothing_is_computed_for_those_who_do_not_ask() -> None:
    assert measure(mx.zeros((2, 9)), mx.array([0, 1]), [None, None]).arrays == ()


def told(engine: Any, requests: list[Request]) -> dict[str, list[tuple[int, Logprob]]]:
    found: dict[str, list[tuple[int, Logprob]]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for gain in engine.step().gains:
            asked = next(request.logprobs for request in requests if request.request_id == gain.request_id)
            assert len(gain.logprobs) == (0 if asked is None else len(gain.tokens))
            found[gain.request_id] += zip(gain.tokens, gain.logprobs or [Logprob(0.0)] * len(gain.tokens), strict=True)
    return found


@pytest.mark.parametrize("sampling", [Sampling(), PENALIZED], ids=["greedy", "penalized"])
@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_speculation_tells_what_plain_decoding_tells(sampling: Sampling, wrong: float) -> None:
    requests = [tiny.make_request(i, sampling=sampling, logprobs=(None, 0, 5)[i % 3]) for i in range(8)]
    expected: dict[str, list[tuple[int, Logprob]]] = {}
    for request in requests:
        expected |= told(tiny.make_engine(model()), [plain(request)])
    outputs = {r.prompt: [token for token, _ in expected[r.request_id]] for r in requests}
    engine = tiny.make_engine(model(), tiny.Oracle(outputs, wrong))
    found = told(engine, requests)
    assert engine.totals.drafted > 0
    for name, tokens in expected.items():
        assert [token for token, _ in found[name]] == [token for token, _ in tokens]
        for (_, one), (_, other) in zip(found[name], tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-6)


def plain(request: Request) -> Request:
    return tiny.make_request(
        int(request.request_id[1:]),
        sampling=request.sampling,
        logprobs=request.logprobs,
        speculation=tiny.plain(request).speculation,
    )


def test_they_are_the_models_own_whatever_the_sampling() -> None:
    """Before bias, penalties, temperature and filters: those of a plain forward over the whole text."""
    request = tiny.make_request(4, sampling=PENALIZED, logprobs=2, max_tokens=20)
    found = told(tiny.make_engine(model()), [request])["r4"]
    text = [*request.prompt, *(token for token, _ in found)]
    logits = model()(mx.array([text]))[0]
    for i, (token, logprob) in enumerate(found):
        expected = log_softmax(logits[len(request.prompt) + i - 1].tolist())
        assert logprob.logprob == pytest.approx(expected[token], abs=1e-4)
        assert logprob.top[0][1] == pytest.approx(max(expected), abs=1e-4)


def test_a_resumed_request_tells_of_new_tokens_only() -> None:
    whole = told(tiny.make_engine(model()), [tiny.make_request(4, logprobs=3, max_tokens=20)])["r4"]
    made = tuple(token for token, _ in whole[:8])
    rest = told(tiny.make_engine(model()), [tiny.make_request(4, logprobs=3, max_tokens=20, resume=made)])["r4"]
    assert [token for token, _ in rest] == [token for token, _ in whole[8:]]
    for (_, one), (_, other) in zip(rest, whole[8:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
