"""The n-gram drafter."""

from hypothesis import given
from hypothesis import strategies as st

from common.sampling import Sampling
from worker.drafters.drafter import Offer
from worker.drafters.ngram import NgramDrafter
from worker.request import Request, Row


def row(tokens: list[int]) -> Row:
    return Row.of(Request(request_id="r", prompt=tuple(tokens), sampling=Sampling(), max_tokens=9), 0, 0.0)


def offer(tokens: list[int], limit: int = 4, drafter: NgramDrafter | None = None) -> tuple[tuple[int, ...], int]:
    """Offered tokens and the match that they come from."""
    offered = (drafter or NgramDrafter(4)).offer(row(tokens), limit)
    if offered is None:
        return (), 0
    assert offered.tokens is not None
    assert offered == Offer("ngram", len(offered.tokens), offered.match, offered.tokens)
    return offered.tokens, offered.match


def test_proposes_what_followed_the_longest_match() -> None:
    assert offer([1, 2, 3, 9, 9, 3, 7, 1, 2, 3], 2) == ((9, 9), 3)


def test_prefers_the_latest_of_equal_matches() -> None:
    assert offer([5, 1, 5, 2, 5], 1) == ((2,), 1)


def test_nothing_seen_before_gives_no_draft() -> None:
    assert offer([1, 2, 3]) == ((), 0)


def test_a_period_goes_on_beyond_the_rows_end() -> None:
    assert offer([1, 2, 1, 2], 5) == ((1, 2, 1, 2, 1), 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_growing_the_index_equals_indexing_at_once(tokens: list[int]) -> None:
    drafter = NgramDrafter(4)
    for end in range(1, len(tokens) + 1):
        latest = offer(tokens[:end], 3, drafter)
    assert latest == offer(tokens, 3)
    drafter.forget(row(tokens), is_finished=True)
    assert not drafter.indexes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_match_is_the_longest_there_is(tokens: list[int]) -> None:
    _, match = offer(tokens, 1)
    sizes = [
        size
        for size in range(1, min(4, len(tokens) - 1) + 1)
        if any(tokens[end - size : end] == tokens[-size:] for end in range(size, len(tokens)))
    ]
    assert match == max(sizes, default=0)
