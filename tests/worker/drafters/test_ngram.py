"""The n-gram drafter."""

from hypothesis import given
from hypothesis import strategies as st

from worker.drafters.ngram import NO_DRAFT, Draft, NgramDrafter, NgramIndex


def propose(tokens: list[int], limit: int = 4) -> Draft:
    return NgramDrafter(4).propose(tokens, NgramIndex(), limit)


def test_proposes_what_followed_the_longest_match() -> None:
    assert propose([1, 2, 3, 9, 9, 3, 7, 1, 2, 3], 2) == Draft((9, 9), 3)


def test_prefers_the_latest_of_equal_matches() -> None:
    assert propose([5, 1, 5, 2, 5], 1) == Draft((2,), 1)


def test_nothing_seen_before_gives_no_draft() -> None:
    assert propose([1, 2, 3]) == NO_DRAFT


def test_a_period_goes_on_beyond_the_rows_end() -> None:
    assert propose([1, 2, 1, 2], 5) == Draft((1, 2, 1, 2, 1), 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_growing_the_index_equals_indexing_at_once(tokens: list[int]) -> None:
    drafter, grown = NgramDrafter(4), NgramIndex()
    for end in range(1, len(tokens) + 1):
        latest = drafter.propose(tokens[:end], grown, 3)
    assert latest == drafter.propose(tokens, NgramIndex(), 3)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_match_is_the_longest_there_is(tokens: list[int]) -> None:
    draft = NgramDrafter(4).propose(tokens, NgramIndex(), 1)
    sizes = [
        size
        for size in range(1, min(4, len(tokens) - 1) + 1)
        if any(tokens[end - size : end] == tokens[-size:] for end in range(size, len(tokens)))
    ]
    assert draft.match == max(sizes, default=0)
