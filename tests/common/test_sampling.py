"""Ranges of sampling parameters, at their edges."""

import math

import pytest

from common.errors import InvalidValue
from common.sampling import (
    MAX_DRAFT_TOKENS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    Sampling,
    Speculation,
    check_sampling,
    check_speculation,
    check_stop,
)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=2.0, top_p=1e-9, top_k=1_000_000, min_p=1.0, seed=MAX_SEED),
        Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0),
    ],
)
def test_values_within_range_pass(sampling: Sampling) -> None:
    check_sampling(sampling)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 1_000_001),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
    ],
)
def test_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InvalidValue, match=name) as caught:
        check_sampling(Sampling(**{name: value}))  # type: ignore[arg-type]
    assert caught.value.param == name


def test_greedy_is_temperature_zero() -> None:
    assert Sampling().is_greedy
    assert not Sampling(temperature=0.1).is_greedy


@pytest.mark.parametrize(
    ("speculation", "is_on"),
    [
        (Speculation(), True),
        (Speculation(drafter="ngram", max_draft_tokens=MAX_DRAFT_TOKENS), True),
        (Speculation(drafter="none"), False),
        (Speculation(max_draft_tokens=0), False),
    ],
)
def test_speculation_is_on_unless_switched_off(speculation: Speculation, is_on: bool) -> None:
    check_speculation(speculation)
    assert speculation.is_on == is_on


@pytest.mark.parametrize(
    "speculation",
    [
        Speculation(drafter="magic"),
        Speculation(max_draft_tokens=-1),
        Speculation(max_draft_tokens=MAX_DRAFT_TOKENS + 1),
    ],
)
def test_impossible_speculation_is_refused(speculation: Speculation) -> None:
    with pytest.raises(InvalidValue, match="speculative"):
        check_speculation(speculation)


def test_stop_strings_are_bounded() -> None:
    check_stop(())
    check_stop(("x" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS)
    for stop in (("x",) * (MAX_STOP_STRINGS + 1), ("",), ("x" * (MAX_STOP_CHARS + 1),)):
        with pytest.raises(InvalidValue, match="stop"):
            check_stop(stop)
