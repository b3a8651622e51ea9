"""Matches and continuations over a text's n-grams, beside a plain search through the whole text."""

import random
import sys
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.drafters import occurrences
from worker.drafters.occurrences import (
    LONGEST_SEARCHED,
    MOST_PLACES,
    NO_MATCH,
    NO_TOKEN,
    SIZES,
    Match,
    Occurrences,
    continuation,
)

few_kinds = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def searched(text: Sequence[int], row: Sequence[int]) -> tuple[int, list[int]]:
    """The longest match of the row's end before a place inside `text`, and all such places, the latest first."""
    lengths = {place: plain_common_suffix(text[:place], row) for place in range(1, len(text))}
    longest = max(lengths.values(), default=0)
    return longest, [place for place in sorted(lengths, reverse=True) if lengths[place] == longest and longest]


def plain_common_suffix(a: Sequence[int], b: Sequence[int]) -> int:
    return max(n for n in range(min(len(a), len(b)) + 1) if not n or list(a[-n:]) == list(b[-n:]))


def indexed(text: Sequence[int]) -> Occurrences:
    index = Occurrences(len(text))
    index.extend(text)
    return index


def find(text: Sequence[int], row: Sequence[int]) -> Match:
    return indexed(text).find(text, row)


def copied(text: Sequence[int], limit: int, doubt: float = 2.0, least_reach: float = 0.0) -> tuple[int, ...]:
    return continuation(text, find(text, text), limit, doubt, least_reach).tokens


# --- the match ----------------------------------------------------------------------------------------


def test_finds_the_longest_match() -> None:
    assert find([1, 2, 3, 9, 9, 3, 7, 1, 2, 3], [1, 2, 3]) == Match(3, [3])


def test_keeps_all_places_of_the_longest_match_the_latest_first() -> None:
    assert find([5, 1, 5, 2, 5, 3], [5]) == Match(1, [5, 3, 1])


def test_an_empty_text_and_an_unknown_token_have_no_match() -> None:
    assert find([], [1]) == NO_MATCH
    assert find([1, 2, 3], [4]) == NO_MATCH


def test_a_text_and_its_neighbour_are_not_matched_as_one() -> None:
    assert find([1, 2, NO_TOKEN, 3, 4], [1, 2, 3]) == Match(1, [4])


@given(few_kinds)
def test_a_rows_match_is_the_longest_there_is_with_all_its_places(row: list[int]) -> None:
    longest, places = searched(row, row)
    found = find(row, row)
    assert found.length == longest
    if len(places) <= MOST_PLACES:
        assert list(found.places) == places
    else:
        assert list(found.places) == places[: len(found.places)]


@given(few_kinds, few_kinds)
def test_a_match_in_another_text_is_the_longest_there_is(text: list[int], row: list[int]) -> None:
    longest, places = searched(text, row)
    found = find(array("i", text), row)
    assert found.length == longest
    assert list(found.places) == places[: len(found.places)]


@given(few_kinds, st.lists(st.integers(1, 7), max_size=20))
def test_a_match_followed_step_by_step_is_the_one_found_at_once(row: list[int], strides: list[int]) -> None:
    index, match, seen = Occurrences(8), NO_MATCH, 0
    ends = [sum(strides[:n]) for n in range(1, len(strides) + 1)]
    for end in [*(e for e in ends if e < len(row)), len(row)]:
        head = row[:end]
        index.extend(head)
        match, seen = index.follow(head, match, head, seen), end
    assert (match.length, match.places[:1]) == (find(row, row).length, find(row, row).places[:1])


def test_a_match_that_goes_on_grows_beyond_what_is_searched() -> None:
    passage = random.Random(3).sample(range(1000), 3 * LONGEST_SEARCHED)
    index, match, seen = Occurrences(1000), NO_MATCH, 0
    for end in range(len(passage), 2 * len(passage)):
        row = (passage * 2)[:end]
        index.extend(row)
        match, seen = index.follow(row, match, row, seen), end
    assert match == Match(len(passage) - 1, [len(passage) - 1])


@given(few_kinds, few_kinds, few_kinds)
def test_a_shared_hash_is_no_match(text: list[int], other: list[int], row: list[int]) -> None:
    """An index with two slots only, where n-grams of all kinds hang in one chain."""
    index = Occurrences(2)
    index.capacity = len(text)
    index.extend(text)
    for place in (found := index.find(text, row)).places:
        assert plain_common_suffix(text[:place], row) == found.length > 0


def test_a_search_looks_at_a_bounded_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measure = occurrences.common_suffix

    def counting(text: Sequence[int], place: int, row: Sequence[int], least: int) -> int:
        seen.append(place)
        return measure(text, place, row, least)

    monkeypatch.setattr(occurrences, "common_suffix", counting)
    text = [7, *([1, 2] * 2000), 3, 2]
    assert find(text, text).length == 1
    assert len(seen) <= len(SIZES) * MOST_PLACES


# --- the continuation -----------------------------------------------------------------------------------


def test_copies_what_followed() -> None:
    assert copied([1, 2, 3, 4, 5, 1, 2], 3) == (3, 4, 5)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_copies_no_more_than_the_limit(limit: int) -> None:
    assert len(copied([1, 2, 3, 4, 5, 1, 2], limit)) == limit


def test_a_period_goes_on_beyond_the_texts_end() -> None:
    assert copied([1, 2, 3, 1, 2, 3], 7) == (1, 2, 3, 1, 2, 3, 1)


def test_the_commonest_follower_wins_and_of_equals_the_latest() -> None:
    assert copied([5, 1, 5, 1, 5, 2, 5], 1) == (1,)
    assert copied([5, 1, 5, 2, 5], 1) == (2,)


def test_a_path_stays_with_the_places_that_led_to_it() -> None:
    text = [9, 1, 7, 9, 1, 8, 9, 1, 8, 9, 2, 6, 9]
    assert copied(text, 3) == (1, 8, 9)


def test_nothing_is_copied_beyond_a_texts_end() -> None:
    text = array("i", [1, 2, 3, NO_TOKEN, 8, 9])
    assert continuation(text, find(text, [1, 2]), 5, 2.0, 0.0).tokens == (3,)


def test_chances_are_shares_with_a_doubt_that_a_longer_match_lessens() -> None:
    text = [5, 1, 5, 1, 5, 2, 5]
    followed = continuation(text, find(text, text), 2, 2.0, 0.0)
    assert followed.chances == pytest.approx((2 / (3 + 2), 2 / (2 + 2 / 2)))
    assert followed.expected == pytest.approx(0.4 + 0.4 * 2 / 3)


def test_a_path_ends_where_it_is_hardly_ever_reached() -> None:
    text = [5, 1, 6, 7, 8, 9, 5]  # one place, match 1: chances 1/3, 1/2, 3/5, 2/3 …
    assert copied(text, 8, least_reach=0.15) == (1, 6)
    assert copied(text, 8, least_reach=0.5) == (1,), "the first token is the controller's to refuse"


# --- memory ----------------------------------------------------------------------------------------------


def test_an_index_takes_the_bytes_it_says() -> None:
    text = random.Random(5).choices(range(1000), k=5000)
    index = indexed(text)
    arrays = [*index._latest, *index._before]
    assert sum(a.itemsize * len(a) for a in arrays) == Occurrences.bytes_for(5000)
    assert sum(map(sys.getsizeof, arrays)) < 1.2 * Occurrences.bytes_for(5000)


@given(st.lists(st.integers(NO_TOKEN, 3), min_size=60, max_size=90))
def test_a_text_indexed_at_once_is_indexed_as_token_by_token(text: list[int]) -> None:
    one_by_one = Occurrences(100)
    for end in range(len(text) + 1):
        one_by_one.extend(text[:end])
    at_once = Occurrences(100)
    at_once.extend(text)
    assert (at_once._latest, at_once._before) == (one_by_one._latest, one_by_one._before)


@given(few_kinds, few_kinds)
def test_a_match_long_enough_is_found_when_shorter_ones_are_not_wanted(text: list[int], row: list[int]) -> None:
    every = find(text, row)
    if every.length >= 3:
        assert indexed(text).find(text, row, least=3) == every


def test_an_index_made_too_small_finds_the_same() -> None:
    text = random.Random(7).choices(range(5), k=300)
    grown = Occurrences(4)
    for end in range(len(text) + 1):
        grown.extend(text[:end])
    assert grown.find(text, text) == find(text, text)
    assert all(len(slots) >= len(text) for slots in grown._latest), "chains stay short"
