"""The suffix drafter: what rows copy from themselves and from others of their scope, and what it forgets."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.drafters.memory import CONTEXT_TOKENS, Memory
from worker.drafters.occurrences import Occurrences
from worker.drafters.suffix import LONGEST_TOLD, NO_COPY, Copy, SuffixDrafter

POEM = list(range(100, 140))


def propose(tokens: Sequence[int], limit: int = 4) -> Copy:
    return SuffixDrafter(least_reach=0.0).propose("row", "key", tokens, limit)


def after(output: Sequence[int], scope: str = "key") -> SuffixDrafter:
    """A drafter that has seen a row of `scope` end with `output`."""
    drafter = SuffixDrafter(least_reach=0.0)
    drafter.finish("first", scope, [1, 2, 3, *output], 3)
    return drafter


# --- from the row itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "limit", "draft"),
    [
        ([1, 2, 3, 9, 9, 3, 7, 1, 2, 3], 2, Copy((9, 9), 3)),
        ([1, 2, 3], 4, NO_COPY),
        ([1], 4, NO_COPY),
        ([], 4, NO_COPY),
        ([1, 2, 1, 2], 5, Copy((1, 2, 1, 2, 1), 2)),
        ([5, 1, 5], 0, NO_COPY),
    ],
    ids=["longest match", "nothing repeats", "one token", "no token", "period", "limit 0"],
)
def test_copies_from_the_row(tokens: list[int], limit: int, draft: Copy) -> None:
    assert propose(tokens, limit) == draft


def test_tells_an_ambiguous_match_as_a_shorter_one() -> None:
    sure = [1, 2, 3, 4, 8, 1, 2, 3, 4]
    torn = [1, 2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3, 4]
    assert propose(sure).match == 4
    assert propose(torn).match == 1


def test_tells_a_match_that_always_went_on_alike_as_a_longer_one() -> None:
    assert propose([0, 6, 1, 0]).match == 1
    assert propose([0, 6, 1, 0, 6, 2, 0, 6, 3, 0]) == Copy((6, 3, 0, 6), 3)


def test_what_is_told_of_a_match_is_bounded() -> None:
    assert propose(POEM + POEM).match == LONGEST_TOLD


def test_a_row_may_show_up_with_many_tokens_and_grow_by_any_number() -> None:
    at_once, grown = SuffixDrafter(), SuffixDrafter()
    row = random.Random(11).choices(range(4), k=900)
    end = 3
    while end < len(row):
        proposed = grown.propose("row", "key", row[:end], 8)
        end += 1 + len(proposed.tokens)
    assert grown.propose("row", "key", row, 8) == at_once.propose("row", "key", row, 8)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_a_draft_is_within_its_limit_and_of_the_rows_tokens(row: list[int], limit: int) -> None:
    draft = SuffixDrafter().propose("row", "key", row, limit)
    assert len(draft.tokens) <= limit
    assert set(draft.tokens) <= set(row)
    assert bool(draft.tokens) == (row[-1] in row[:-1])
    assert (1 <= draft.match <= LONGEST_TOLD) == bool(draft.tokens)


# --- from others of the scope -------------------------------------------------------------------------------


def test_a_row_copies_what_another_of_its_scope_wrote() -> None:
    drafter = after(POEM)
    assert drafter.propose("second", "key", [9, 8, *POEM[:5]], 6).tokens == tuple(POEM[5:11])


def test_the_same_prompt_is_answered_from_memory_from_the_first_token_on() -> None:
    drafter, prompt = SuffixDrafter(least_reach=0.0), list(range(30))
    drafter.finish("first", "key", [*prompt, *POEM], len(prompt))
    assert drafter.propose("second", "key", prompt, 4).tokens == tuple(POEM[:4])


def test_only_the_end_of_a_prompt_is_remembered() -> None:
    drafter, prompt = SuffixDrafter(least_reach=0.0), list(range(30))
    drafter.finish("first", "key", [*prompt, *POEM], len(prompt))
    assert drafter.propose("second", "key", prompt[: 29 - CONTEXT_TOKENS], 4) == NO_COPY


def test_scopes_do_not_see_each_other() -> None:
    drafter = after(POEM, scope="mine")
    assert drafter.propose("a", "yours", POEM[:5], 6) == NO_COPY
    assert drafter.propose("b", "mine", POEM[:5], 6) != NO_COPY
    assert drafter.propose("c", "", POEM[:5], 6) == NO_COPY


def test_a_short_match_elsewhere_is_not_followed() -> None:
    drafter = after(POEM)
    assert drafter.propose("second", "key", [9, *POEM[:2]], 4) == NO_COPY
    assert drafter.propose("third", "key", [9, *POEM[:3]], 4) != NO_COPY


def test_the_rows_own_match_goes_before_an_equal_one_elsewhere() -> None:
    drafter = after([1, 2, 3, 4, 50, 51, 52])
    assert drafter.propose("second", "key", [1, 2, 3, 4, 60, 61, 1, 2, 3, 4], 1).tokens == (60,)


def test_the_rows_own_match_goes_before_a_little_longer_one_elsewhere() -> None:
    drafter = after([1, 2, 3, 4, 50, 51, 52])
    assert drafter.propose("second", "key", [9, 2, 3, 4, 60, 61, 1, 2, 3, 4], 1).tokens == (60,)


def test_a_much_longer_match_elsewhere_goes_before_the_rows_own() -> None:
    drafter = after(POEM)
    assert drafter.propose("second", "key", [POEM[19], 5, 6, *POEM[:20]], 3).tokens == tuple(POEM[20:23])


def test_the_commonest_of_several_outputs_is_proposed() -> None:
    drafter = SuffixDrafter()
    for last in (7, 8, 7, 9):
        drafter.finish("row", "key", [*POEM, last], 0)
    assert drafter.propose("next", "key", POEM, 1).tokens == (7,)


def test_a_live_row_sees_what_ends_while_it_runs() -> None:
    drafter = SuffixDrafter(least_reach=0.0)
    assert drafter.propose("live", "key", POEM[:5], 4) == NO_COPY
    drafter.finish("other", "key", POEM, 0)
    assert drafter.propose("live", "key", POEM[:6], 4).tokens == tuple(POEM[6:10])


def test_a_row_in_a_long_match_turns_to_a_longer_one_that_has_ended_since() -> None:
    drafter = after(POEM[5:])
    assert drafter.propose("live", "key", POEM[:12], 1).tokens == (POEM[12],)
    drafter.finish("other", "key", [*POEM[:13], 7, 8, 9], 0)
    assert drafter.propose("live", "key", POEM[:13], 2).tokens == (7, 8)


def test_a_copy_ends_with_the_output_that_it_comes_from() -> None:
    drafter = after(POEM[:10])
    drafter.finish("other", "key", [7, 8, 9], 0)
    assert drafter.propose("second", "key", POEM[:8], 6).tokens == (POEM[8], POEM[9])


def test_nothing_is_learned_from_a_row_that_is_forgotten() -> None:
    drafter = SuffixDrafter()
    drafter.propose("gone", "key", POEM, 4)
    drafter.drop("gone")
    drafter.drop("never seen")
    assert drafter.propose("next", "key", POEM[:5], 4) == NO_COPY
    assert set(drafter._rows) == {"next"}


def test_a_row_without_output_teaches_nothing() -> None:
    drafter = SuffixDrafter()
    drafter.finish("row", "key", POEM, len(POEM))
    assert drafter.propose("next", "key", POEM[:5], 4) == NO_COPY


# --- bounds ------------------------------------------------------------------------------------------------------


def test_the_old_generation_goes_when_the_young_one_is_full() -> None:
    drafter = SuffixDrafter(generation_tokens=100)
    outputs = [list(range(1000 * n, 1000 * n + 40)) for n in range(5)]  # two to a generation
    for output in outputs:
        drafter.finish("row", "key", output, 0)
    known = [bool(drafter.propose(f"{n}", "key", output[:5], 4).tokens) for n, output in enumerate(outputs)]
    assert known == [False, False, True, True, True]


def test_of_an_output_too_long_for_a_generation_the_end_is_kept() -> None:
    drafter, output = SuffixDrafter(generation_tokens=100), list(range(250))
    drafter.finish("row", "key", output, 0)
    assert drafter.propose("a", "key", output[200:205], 2).tokens == (205, 206)
    assert drafter.propose("b", "key", output[100:105], 2) == NO_COPY


def test_the_scope_least_recently_used_is_dropped() -> None:
    drafter = SuffixDrafter(scopes=2)
    drafter.finish("row", "a", POEM, 0)
    drafter.finish("row", "b", POEM, 0)
    assert drafter.propose("reader of a", "a", POEM[:5], 4) != NO_COPY
    drafter.finish("row", "c", POEM, 0)
    assert [bool(drafter.propose(f"of {s}", s, POEM[:5], 4).tokens) for s in "abc"] == [True, False, True]


def test_memory_stays_within_what_it_says_however_much_is_written() -> None:
    drafter, dice = SuffixDrafter(scopes=2, generation_tokens=1000), random.Random(2)
    for n in range(400):
        output = dice.choices(range(50000), k=dice.choice([1, 40, 300, 998, 999, 1000, 1500]))
        scope = str(n // 100)
        drafter.propose("row", scope, output[:10], 8)
        drafter.finish("row", scope, output, 0)
        assert len(drafter._memories) <= 2
        assert all(taken_bytes(memory) <= Memory.bytes_for(1000) for memory in drafter._memories.values())
    assert not drafter._rows


def taken_bytes(memory: Memory) -> int:
    arrays = [a for one in memory.generations() for a in (one.text, *one.places._latest, *one.places._before)]
    return sum(a.itemsize * len(a) for a in arrays)


def test_the_default_memory_is_as_documented() -> None:
    assert Memory.bytes_for(1 << 16) == 3.5 * (1 << 20)
    assert 24 <= Occurrences.bytes_for(3000) / 3000 <= 36
