"""What steps take over what was timed: which of several causes is blamed, and how fast."""

import numpy as np
import pytest

from worker.time_factors import Kind, TimeFactors

GRID = (1, 2, 4, 8, 16, 32)
AT = {size: [(place, 1.0)] for place, size in enumerate(GRID)}


def price(factors: TimeFactors, size: int) -> float:
    """Of a plain step of this size, over what was timed."""
    return factors.machine * float(factors.sizes[GRID.index(size)])


def learn(factors: TimeFactors, size: int, ratio: float, kind: Kind = Kind.PLAIN, times: int = 1) -> None:
    for _ in range(times):
        factors.learn(ratio, AT[size], kind)


def test_steps_of_one_size_make_no_other_size_look_cheap() -> None:
    """All that was seen is slower by half: so, as far as anybody knows, is all."""
    factors = TimeFactors(GRID)
    learn(factors, 8, 1.5, times=2000)
    assert price(factors, 8) == pytest.approx(1.5, rel=0.01)
    assert price(factors, 16) == pytest.approx(1.5, rel=0.05)
    assert price(factors, 1) == pytest.approx(1.5, rel=0.1)


def test_sizes_are_told_apart_by_steps_of_both() -> None:
    factors = TimeFactors(GRID)
    for _ in range(60):
        learn(factors, 8, 1.2)
        learn(factors, 32, 1.6)
    assert price(factors, 8) == pytest.approx(1.2, rel=0.02)
    assert price(factors, 32) == pytest.approx(1.6, rel=0.02)
    assert 1.25 < price(factors, 16) < 1.55  # lies between them


def test_noise_about_the_truth_leaves_it() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 3000)
    factors = TimeFactors(GRID)
    off = []
    for number, one in enumerate(noise.tolist()):
        size = 16 if number % 4 == 0 else 8
        learn(factors, size, float(np.exp(one)), Kind.COMPUTED if size == 16 else Kind.PLAIN)
        off.append(price(factors, 16) / price(factors, 8) - 1)
    assert abs(np.mean(off)) < 0.02 and np.std(off) < 0.04
    assert np.all(factors.computed < 1.03) and factors.copied == 1.0


def test_a_slow_moment_in_drafted_steps_is_the_machines_once_a_plain_one_says_so() -> None:
    factors = TimeFactors(GRID)
    for _ in range(50):
        learn(factors, 8, 1.0)
        learn(factors, 16, 1.0, Kind.COPIED)
    learn(factors, 16, 1.4, Kind.COPIED, times=6)
    blamed = price(factors, 16) / price(factors, 8) * factors.copied
    assert 1.0 < blamed < 1.05
    learn(factors, 8, 1.4)
    assert price(factors, 8) == pytest.approx(1.4, rel=0.02)
    assert price(factors, 16) * factors.copied == pytest.approx(1.4, rel=0.03)


def test_dear_drafts_are_known_by_their_kind() -> None:
    factors = TimeFactors(GRID)
    for _ in range(100):
        learn(factors, 8, 1.0)
        learn(factors, 8, 1.25, Kind.COMPUTED)
        learn(factors, 8, 1.1, Kind.COPIED)
    assert price(factors, 8) == pytest.approx(1.0, rel=0.02)
    assert factors.computed[GRID.index(8)] == pytest.approx(1.25, rel=0.03)
    assert factors.copied == pytest.approx(1.1, rel=0.02)


def test_what_is_cheaper_than_its_parts_is_no_credit() -> None:
    factors = TimeFactors(GRID)
    for _ in range(100):
        learn(factors, 8, 1.0)
        learn(factors, 8, 0.8, Kind.COMPUTED)
    assert np.all(factors.computed == 1.0)


@pytest.mark.parametrize("seen", [0, 100])
def test_a_hiccup_says_little_and_a_machine_that_stays_slow_is_believed(seen: int) -> None:
    factors = TimeFactors(GRID)
    learn(factors, 8, 1.0, times=seen)
    learn(factors, 8, 900.0)
    assert factors.machine < 1.08
    learn(factors, 8, 4.0, times=100)
    assert price(factors, 8) == pytest.approx(4.0, rel=0.05)


def test_what_is_known_of_drafts_fades_while_there_are_none() -> None:
    factors = TimeFactors(GRID)
    for _ in range(100):
        learn(factors, 8, 1.0)
        learn(factors, 8, 1.25, Kind.COMPUTED)
    learn(factors, 8, 1.0, times=2000)
    assert 1.0 < factors.computed[GRID.index(8)] < 1.08


def test_it_stays_a_covariance() -> None:
    """However long it runs: symmetric, and nothing is surer than sure."""
    chance = np.random.default_rng(2)
    factors = TimeFactors(GRID)
    kinds = list(Kind)
    for _ in range(20_000):
        learn(factors, int(chance.choice(GRID)), float(np.exp(chance.normal(0, 0.5))), kinds[chance.integers(3)])
    covariance = factors._covariance
    assert np.allclose(covariance, covariance.T, atol=1e-9)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
