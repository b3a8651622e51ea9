"""Coupled sampling draws from the right distribution, and from nothing else."""

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from common.sampling import Sampling
from tests.worker import reference
from worker import backend
from worker.request import Request, Row
from worker.sampling.sampler import Draw, Part, choose, noise_key


@pytest.fixture(autouse=True, params=["by row", "at once", "at once, compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As a CPU chooses, and as a GPU does: there all rows go through one function."""
    if request.param != "by row":
        monkeypatch.setattr(backend, "name", lambda: "cuda")
    if request.param == "at once":
        mx.disable_compile()
    yield request.param
    mx.enable_compile()


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def draw_many(sampling: Sampling, count: int = 4000) -> np.ndarray:
    logits = mx.broadcast_to(mx.array(LOGITS), (count, len(LOGITS)))
    tokens = choose(logits, [Draw(sampling, position) for position in range(count)])
    return np.bincount(np.array(tokens), minlength=len(LOGITS))


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(np.array(logits) / temperature)
    return weights / weights.sum()


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    expected = chances * counts.sum()
    inside = expected > 0
    assert not counts[~inside].any()
    return float(((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = draw_many(Sampling(temperature=temperature, seed=3))
    assert chi_square(counts, softmax(LOGITS, temperature)) < 20.5  # 0.1 % of right samplers fail, 5 degrees


def test_the_test_of_draws_can_fail() -> None:
    counts = draw_many(Sampling(temperature=1.3, seed=3))
    assert chi_square(counts, softmax(LOGITS, 1.0)) > 20.5


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_k=6), 6),
        (Sampling(temperature=1.0, top_p=0.6), 2),
        (Sampling(temperature=1.0, top_p=0.5), 1),
        (Sampling(temperature=1.0, min_p=math.exp(-1.6)), 3),
        (Sampling(temperature=1.0, top_k=4, top_p=0.9), 3),
        (Sampling(temperature=1.0, top_p=0.001), 1),
    ],
)
def test_filters_keep_the_right_tokens_and_their_odds(sampling: Sampling, kept: int) -> None:
    chances = softmax(LOGITS)
    chances[kept:] = 0
    counts = draw_many(sampling)
    assert chi_square(counts, chances / chances.sum()) < 20.5


def test_a_token_depends_on_seed_and_position_alone() -> None:
    generator = np.random.default_rng(0)
    logits = mx.array(generator.normal(size=(6, 50)).astype(np.float32))
    draws = [
        Draw(Sampling(temperature=1.0, seed=1), 5),
        Draw(Sampling(), 5),
        Draw(Sampling(temperature=0.8, top_p=0.9, seed=2), 6),
        Draw(Sampling(temperature=1.0, top_k=5, seed=3), 7),
        Draw(Sampling(temperature=1.0, seed=1), 5),
        Draw(Sampling(temperature=2.0, min_p=0.1, seed=9), 1),
    ]
    together = choose(logits, draws).tolist()
    alone = [choose(logits[i : i + 1], draws[i : i + 1]).item() for i in range(6)]
    assert together == alone


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_of_a_part_of_the_vocabulary_that_is_chosen_which_would_be_of_all_if_the_others_were_unlikely(
    top_p: float,
) -> None:
    generator = np.random.default_rng(0)
    columns = mx.array([3, 4, 11, 30, 49])
    logits = mx.array(generator.normal(size=(40, 5)).astype(np.float32))
    everywhere = mx.full((40, 50), -1e4)
    everywhere[:, columns] = logits
    draws = [Draw(Sampling(temperature=i % 3 / 2, top_p=top_p, seed=i), i) for i in range(40)]
    places = choose(logits, draws, Part(columns, 50))
    assert columns[places].tolist() == choose(everywhere, draws).tolist()
    assert len(set(places.tolist())) == 5


def test_greedy_takes_the_largest_logit() -> None:
    assert choose(mx.array([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]]), [Draw(Sampling(), 0)] * 2).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_logits_that_are_not_finite_give_no_token(bad: float, sampling: Sampling) -> None:
    assert choose(mx.array([[0.0, bad, 1.0], [0.0, 0.5, 1.0]]), [Draw(sampling, 0), Draw(Sampling(), 0)]).tolist() == [
        -1,
        2,
    ]


def test_seeds_and_positions_have_keys_of_their_own() -> None:
    keys = {noise_key(seed, position) for seed in (0, 1, 2, 2**62, 2**63 - 1) for position in range(50)}
    assert len(keys) == 250


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6, top_k=4, repetition_penalty=1.9, seed=1),
        Sampling(temperature=1.4, top_p=0.8, presence_penalty=1.0, frequency_penalty=0.5, seed=2),
        Sampling(temperature=1.0, min_p=0.2, logit_bias=((5, 5.0), (0, -3.0)), frequency_penalty=-1.0, seed=3),
        Sampling(repetition_penalty=3.0, frequency_penalty=0.5, logit_bias=((1, 0.6),)),
    ],
)
def test_biases_and_penalties_come_before_temperature_and_filters(sampling: Sampling) -> None:
    prompt, output, count = (0, 2), (1, 1, 5), 4000
    row = row_of(sampling, prompt, output)
    (draw,) = row.draws(())
    logits = mx.broadcast_to(mx.array(LOGITS), (count, len(LOGITS)))
    tokens = choose(logits, [Draw(sampling, position, draw.tally) for position in range(count)])
    counts = np.bincount(np.array(tokens), minlength=len(LOGITS))
    chances = np.array(reference.chances(LOGITS, sampling, prompt, output))
    assert chi_square(counts, chances) < 20.5


def row_of(sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...]) -> Row:
    return Row.of(Request("r", prompt, sampling, max_tokens=99, resume=output), 0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_choices_after_a_draft_are_those_after_the_same_tokens_committed(temperature: float) -> None:
    sampling = Sampling(
        temperature=temperature, seed=8, repetition_penalty=1.2, frequency_penalty=0.4, logit_bias=((3, 1.0),)
    )
    generator = np.random.default_rng(1)
    draft = (4, 4, 9, 3, 20)
    logits = mx.array(generator.normal(size=(len(draft) + 1, 30)).astype(np.float32))
    together = choose(logits, row_of(sampling, (4, 6), (9,)).draws(draft)).tolist()
    one_by_one = [
        choose(logits[i : i + 1], row_of(sampling, (4, 6), (9, *draft[:i])).draws(())).item()
        for i in range(len(draft) + 1)
    ]
    assert together == one_by_one


def test_penalized_logits_that_are_not_finite_give_no_token() -> None:
    (draw,) = row_of(Sampling(repetition_penalty=1.5), (0, 1), ()).draws(())
    assert choose(mx.array([[0.0, math.nan, 1.0]]), [draw]).tolist() == [-1]
