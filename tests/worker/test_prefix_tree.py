"""The radix tree: longest prefixes, splits, and its budget, against a plain set of sequences."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.prefix_tree import PrefixTree, shared_tokens

BYTES = 3  # a token


@dataclass(frozen=True)
class Text:
    """A span that knows its tokens."""

    tokens: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return BYTES * len(self.tokens)

    def split(self, at: int) -> "tuple[Text, Text]":
        return Text(self.tokens[:at]), Text(self.tokens[at:])


def put(tree: PrefixTree[Text], tokens: tuple[int, ...], budget: int = 10**9, least: int = 1) -> int:
    return tree.insert(tokens, lambda start, end: Text(tokens[start:end]), BYTES, budget, least)


def found(tree: PrefixTree[Text], tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for piece in tree.find(tokens) for token in piece.span.tokens[: piece.tokens])


def longest(stored: set[tuple[int, ...]], tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The longest prefix that some stored sequence begins with, the slow way."""
    for size in range(len(tokens), 0, -1):
        if any(sequence[:size] == tokens[:size] for sequence in stored):
            return tokens[:size]
    return ()


def test_a_sequence_is_found_by_any_of_its_beginnings() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    assert put(tree, (1, 2, 3, 4)) == 4
    assert found(tree, (1, 2, 3, 4, 5)) == (1, 2, 3, 4)
    assert found(tree, (1, 2, 9)) == (1, 2)
    assert found(tree, (2, 3)) == ()


def test_only_what_is_new_is_copied() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    put(tree, (1, 2, 3, 4))
    assert put(tree, (1, 2, 3, 4)) == 0
    assert put(tree, (1, 2)) == 0
    assert put(tree, (1, 2, 3, 4, 5, 6)) == 2
    assert put(tree, (1, 2, 7, 8)) == 2
    assert tree.nbytes == 8 * BYTES
    assert sorted(tree.sequences()) == [(1, 2, 3, 4, 5, 6), (1, 2, 7, 8)]


def test_short_ends_are_not_stored() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    assert put(tree, (1, 2, 3), least=4) == 0
    assert put(tree, (1, 2, 3, 4), least=4) == 4
    assert put(tree, (1, 2, 3, 4, 5, 6, 7), least=4) == 0
    assert tree.nbytes == 4 * BYTES


def test_the_least_recently_used_end_goes_first() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    for last in (7, 8, 9):
        put(tree, (1, 2, last))
    tree.find((1, 2, 7))
    tree.fit(4 * BYTES)
    assert sorted(tree.sequences()) == [(1, 2, 7), (1, 2, 9)]
    tree.fit(2 * BYTES)
    assert list(tree.sequences()) == [(1, 2)]
    assert tree.evictions == 3


def test_what_does_not_fit_is_cut_and_never_costs_its_own_beginning() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    put(tree, (5, 5, 5))
    put(tree, (1, 2, 3))
    assert put(tree, (1, 2, 3, 4, 5, 6, 7, 8), budget=5 * BYTES) == 2
    assert list(tree.sequences()) == [(1, 2, 3, 4, 5)]
    assert put(tree, (9, 9), budget=0) == 0


def test_many_uses_do_not_make_the_tree_grow() -> None:
    tree: PrefixTree[Text] = PrefixTree()
    put(tree, (1, 2, 3))
    for _ in range(2000):
        tree.find((1, 2, 3))
    assert len(tree._ends) < 100


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)


@given(st.lists(sequences, max_size=20), st.lists(sequences, max_size=10))
def test_without_a_limit_every_longest_prefix_is_found(
    stored: list[tuple[int, ...]], asked: list[tuple[int, ...]]
) -> None:
    tree: PrefixTree[Text] = PrefixTree()
    for sequence in stored:
        put(tree, sequence)
    for tokens in asked + stored:
        assert found(tree, tokens) == longest(set(stored), tokens)
    distinct = {sequence[:size] for sequence in stored for size in range(1, len(sequence) + 1)}
    assert tree.nbytes == BYTES * len(distinct)


@given(st.lists(st.tuples(sequences, st.booleans(), st.integers(0, 40)), max_size=40))
def test_the_budget_holds_and_what_is_left_is_what_was_stored(
    actions: list[tuple[tuple[int, ...], bool, int]],
) -> None:
    """Whatever is stored, found and dropped: sizes add up, no more than the budget, and nothing is made up."""
    tree: PrefixTree[Text] = PrefixTree()
    stored: set[tuple[int, ...]] = set()
    for tokens, is_insert, budget in actions:
        if is_insert:
            new = put(tree, tokens, budget)
            before = len(longest(stored, tokens))
            assert new == 0 or (before <= len(tokens) and tree.nbytes <= budget)
            stored.add(tokens)
        else:
            tree.fit(budget)
            assert tree.nbytes <= budget
        left = set(tree.sequences())
        assert all(any(s[: len(sequence)] == sequence for s in stored) for sequence in left)
        distinct = {sequence[:size] for sequence in left for size in range(1, len(sequence) + 1)}
        assert tree.nbytes == BYTES * len(distinct)
        for sequence in left:
            assert found(tree, sequence) == sequence


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.integers(1, 5))
def test_flat_trees_evict_like_a_list_in_order_of_use(uses: list[str], room: int) -> None:
    """Sequences that share nothing: the tree is an LRU cache."""
    tree: PrefixTree[Text] = PrefixTree()
    kept: list[str] = []
    for name in uses:
        put(tree, (ord(name), 1), budget=room * 2 * BYTES)
        kept = [*(other for other in kept if other != name), name][-room:]
        assert set(tree.sequences()) == {(ord(other), 1) for other in kept}


@pytest.mark.parametrize("seed", range(20))
def test_shared_tokens_are_counted_to_the_first_difference(seed: int) -> None:
    source = random.Random(seed)
    one = [source.randrange(9) for _ in range(source.randrange(300))]
    at = source.randrange(len(one) + 1)
    other = [*one[:at], *([one[at] + 1] if at < len(one) else []), *one[at + 1 : source.randrange(300)]]
    assert shared_tokens(one, other) == next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
