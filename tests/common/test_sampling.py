"""Ranges of sampling parameters, at their edges."""

import math
from typing import Any

import pytest

from common.errors import InvalidValue
from common.sampling import (
    MAX_DRAFT_TOKENS,
    MAX_LOGIT_BIASES,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    Sampling,
    Speculation,
    check_logprobs,
    check_sampling,
    check_speculation,
    check_stop,
    check_vocabulary,
)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=2.0, top_p=1e-9, top_k=1_000_000, min_p=1.0, seed=MAX_SEED),
        Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0),
        Sampling(repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=2.0),
        Sampling(repetition_penalty=10.0, presence_penalty=2.0, frequency_penalty=-2.0),
        Sampling(logit_bias=tuple((i, 100.0 if i % 2 else -100.0) for i in range(MAX_LOGIT_BIASES))),
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
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, 0.0), (2, math.nan))),
        ("logit_bias", ((1, 0.0),) * (MAX_LOGIT_BIASES + 1)),
    ],
)
def test_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=name) as caught:
        check_sampling(Sampling(**{name: value}))
    assert caught.value.param == name


def test_a_bias_out_of_range_is_told_with_its_token() -> None:
    with pytest.raises(InvalidValue, match=r"token 7 is 200.0; it must lie in \[-100.0, 100.0\]"):
        check_sampling(Sampling(logit_bias=((3, 1.0), (7, 200.0))))


@pytest.mark.parametrize("token", [-1, 50])
def test_a_biased_token_has_to_be_in_the_vocabulary(token: int) -> None:
    check_vocabulary(Sampling(logit_bias=((0, 1.0), (49, 1.0))), 50)
    with pytest.raises(InvalidValue, match=rf"token {token}; this model's ids lie in \[0, 49\]"):
        check_vocabulary(Sampling(logit_bias=((0, 1.0), (token, 1.0))), 50)


def test_logprobs_are_bounded_under_their_callers_name() -> None:
    check_logprobs("top_logprobs", 0)
    check_logprobs("top_logprobs", MAX_TOP_LOGPROBS)
    for count in (-1, MAX_TOP_LOGPROBS + 1):
        with pytest.raises(InvalidValue, match=f"top_logprobs is {count}"):
            check_logprobs("top_logprobs", count)


@pytest.mark.parametrize(
    ("sampling", "is_counting", "is_changing"),
    [
        (Sampling(temperature=1.0, top_p=0.5, top_k=3, min_p=0.1), False, False),
        (Sampling(logit_bias=((1, 1.0),)), False, True),
        (Sampling(repetition_penalty=1.1), True, True),
        (Sampling(presence_penalty=0.1), True, True),
        (Sampling(frequency_penalty=-0.1), True, True),
    ],
)
def test_only_biases_and_penalties_change_logits(sampling: Sampling, is_counting: bool, is_changing: bool) -> None:
    assert (sampling.counts_tokens, sampling.changes_logits) == (is_counting, is_changing)


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
