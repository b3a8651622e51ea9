"""Exponentials made in blocks are what independent ones would be, and the host looks at all tokens that could win."""

import numpy as np
import pytest

from common.sampling import Sampling
from worker.sampling import noise, on_host
from worker.sampling.noise import BLOCK, Exponentials, noise_key

VOCABULARY = 5 * BLOCK + 7
DRAWS = 4000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """[draws, vocabulary]"""
    ids = np.arange(VOCABULARY)
    return np.stack([Exponentials(noise_key(3, position), VOCABULARY).of(ids) for position in range(DRAWS)])


def deviations(mean: np.ndarray, expected: float, variance: float, count: int) -> np.ndarray:
    """Standard deviations of a mean of `count` values from what it should be."""
    return np.abs(mean - expected) / np.sqrt(variance / count)


def test_each_is_a_standard_exponential(drawn: np.ndarray) -> None:
    for t in (0.01, 0.1, 1.0, 3.0):
        share = np.exp(-t)
        assert deviations((drawn > t).mean(axis=0), share, share * (1 - share), DRAWS).max() < 4.8
        assert deviations((drawn > t).mean(), share, share * (1 - share), drawn.size) < 4


def test_no_two_go_together(drawn: np.ndarray) -> None:
    """Neither two tokens of a draw, in a block or not, nor one token of two draws."""
    centred = drawn - 1.0  # of mean 0 and variance 1
    between_tokens = centred.T @ centred / DRAWS
    np.fill_diagonal(between_tokens, 0.0)
    assert np.abs(between_tokens).max() * np.sqrt(DRAWS) < 6.5  # 54,000 pairs, of long tails
    between_draws = (centred[1:] * centred[:-1]).mean()
    assert abs(between_draws) * np.sqrt(drawn.size) < 4


def test_the_least_of_all_is_anywhere(drawn: np.ndarray) -> None:
    counts = np.bincount(drawn.argmin(axis=1), minlength=VOCABULARY)
    expected = DRAWS / VOCABULARY
    assert ((counts - expected) ** 2 / expected).sum() < VOCABULARY + 4 * np.sqrt(2 * VOCABULARY)


def test_the_bound_of_a_block_is_reached_by_one_of_its_ids(drawn: np.ndarray) -> None:
    for position in range(50):
        exponentials = Exponentials(noise_key(3, position), VOCABULARY)
        blocks = drawn[position, : 5 * BLOCK].reshape(5, BLOCK)
        assert np.array_equal(blocks.min(axis=1), exponentials.least[:5])
        assert drawn[position, 5 * BLOCK :].min() >= exponentials.least[5]


def test_an_id_has_its_exponential_whichever_others_are_made() -> None:
    ids = np.array([400, 3, 70, 71])
    everything = Exponentials(noise_key(5, 6), 500).of(np.arange(500))
    for kind in (np.int32, np.uint32, np.int64):
        assert Exponentials(noise_key(5, 6), 500).of(ids.astype(kind)).tolist() == everything[ids].tolist()


def test_words_are_those_of_splitmix64() -> None:
    """Reference: the generator's published outputs for the seed 1234567."""
    words = Exponentials((0, 1234567), BLOCK)._words(np.arange(1, 4, dtype=np.uint64))
    assert words.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert noise._mixed(1234567) == 6457827717110365317


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_no_token_that_wins_is_left_out(temperature: float, scale: float) -> None:
    generator = np.random.default_rng(1)
    sampling = Sampling(temperature=temperature, seed=4)
    logits = (generator.normal(size=(300, VOCABULARY)) * scale + generator.normal() * 1e4).astype(np.float32)
    tokens = on_host.chosen(logits, [(sampling, position) for position in range(300)], VOCABULARY, None)
    for position, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        exponentials = Exponentials(noise_key(4, position), VOCABULARY).of(np.arange(VOCABULARY))
        assert token == (row.astype(np.float64) / temperature - np.log(exponentials)).argmax()


def test_a_nucleus_is_the_least_set_of_the_likeliest_that_comes_to_its_share() -> None:
    generator = np.random.default_rng(2)
    for _ in range(200):
        logits = (generator.normal(size=VOCABULARY) * generator.uniform(0, 4)).astype(np.float32)
        top_p = float(generator.uniform(0.01, 0.999))
        left = on_host._left(logits, float(logits.max()), Sampling(temperature=1.0, top_p=top_p))
        weights = np.exp(logits.astype(np.float64))
        share = np.sort(weights[left])[::-1].cumsum() / weights.sum()
        assert share[-1] >= top_p - 1e-5
        assert len(left) == 1 or share[-2] < top_p + 1e-5
        assert weights[left].min() >= np.delete(weights, left).max(initial=0.0)
