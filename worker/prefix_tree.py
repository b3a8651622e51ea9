"""A radix tree of token sequences under a byte budget; the least recently used ends go first (pure).

An edge owns a *span*: something immutable that stands for the edge's tokens and takes memory for each of them. The tree
neither makes spans nor looks into them.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar


class Span(Protocol):
    """What an edge owns."""

    @property
    def nbytes(self) -> int: ...

    def split(self, at: int) -> tuple[Self, Self]:
        """Two spans with memory of their own: of the first `at` tokens, and of the rest."""


S = TypeVar("S", bound=Span)


@dataclass(frozen=True, slots=True)
class Piece(Generic[S]):
    """The first `tokens` tokens of a span."""

    span: S
    tokens: int


@dataclass(slots=True, eq=False)
class _Node(Generic[S]):
    """An edge and the node at its end. `used` grows with each use of the tree."""

    tokens: tuple[int, ...]
    span: S
    parent: "_Node[S] | None"
    used: int
    children: "dict[int, _Node[S]]" = field(default_factory=dict)  # by their first token


@dataclass(frozen=True, slots=True)
class _Walk(Generic[S]):
    """The way along a sequence: nodes, the last of them perhaps in part."""

    nodes: list[_Node[S]]
    tokens: int  # of the sequence that were found
    inside: int  # of the last node


class PrefixTree(Generic[S]):
    """Finds the longest stored prefix of a sequence."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.evictions = 0
        self._children: dict[int, _Node[S]] = {}
        self._uses = 0
        self._size = 0
        self._ends: list[tuple[int, int, _Node[S]]] = []  # heap of leaves by last use; some entries are outdated

    def find(self, tokens: Sequence[int]) -> list[Piece[S]]:
        """The spans of the longest stored prefix, in order; they count as used now."""
        walk = self._walk(tuple(tokens))
        self._touch(walk.nodes)
        pieces = [Piece(node.span, len(node.tokens)) for node in walk.nodes]
        return [*pieces[:-1], Piece(walk.nodes[-1].span, walk.inside)] if pieces else []

    def insert(
        self,
        tokens: Sequence[int],
        make: Callable[[int, int], S],
        bytes_per_token: int,
        budget_bytes: int,
        least_tokens: int = 1,
    ) -> int:
        """Store a sequence; returns how many tokens of it were new and are stored now.

        `make(start, end)` gives the span of the new ones, when there is room for it; it must take `bytes_per_token`.
        What does not fit beside its own prefix is cut off; fewer than `least_tokens` are not worth an edge.
        """
        tokens = tuple(tokens)
        walk = self._walk(tokens)
        room_tokens = max(budget_bytes // bytes_per_token - walk.tokens, 0)
        new_tokens = min(len(tokens) - walk.tokens, room_tokens)
        if new_tokens < max(least_tokens, 1):
            self._touch(walk.nodes)
            return 0
        if walk.nodes and walk.inside < len(walk.nodes[-1].tokens):
            self._split(walk.nodes[-1], walk.inside)
        self._touch(walk.nodes)  # what it continues is now the last to go
        self.fit(budget_bytes - new_tokens * bytes_per_token)
        end = walk.tokens + new_tokens
        self._attach(walk.nodes[-1] if walk.nodes else None, tokens[walk.tokens : end], make(walk.tokens, end))
        return new_tokens

    def fit(self, budget_bytes: int) -> None:
        """Drop least recently used ends until the rest takes at most `budget_bytes`."""
        while self.nbytes > max(budget_bytes, 0):
            used, _, node = heapq.heappop(self._ends)
            if self._is_current(used, node):
                self._remove(node)
                self.evictions += 1

    def sequences(self) -> Iterator[tuple[int, ...]]:
        """Every stored sequence that is not the beginning of another."""
        waiting: list[tuple[tuple[int, ...], _Node[S]]] = [((), node) for node in self._children.values()]
        while waiting:
            before, node = waiting.pop()
            whole = before + node.tokens
            waiting += [(whole, child) for child in node.children.values()]
            if not node.children:
                yield whole

    # --- the way along a sequence -------------------------------------------------------------------------

    def _walk(self, tokens: tuple[int, ...]) -> _Walk[S]:
        nodes: list[_Node[S]] = []
        at, inside, children = 0, 0, self._children
        while at < len(tokens) and (node := children.get(tokens[at])) is not None:
            inside = shared_tokens(node.tokens, tokens[at : at + len(node.tokens)])
            nodes.append(node)
            at += inside
            if inside < len(node.tokens):
                break
            children = node.children
        return _Walk(nodes, at, inside)

    def _touch(self, nodes: list[_Node[S]]) -> None:
        self._uses += 1
        for node in nodes:
            node.used = self._uses
        if nodes:
            self._note_end(nodes[-1])

    # --- changes ------------------------------------------------------------------------------------------

    def _split(self, node: _Node[S], at: int) -> None:
        """Give the end of an edge a node of its own, below."""
        first, rest = node.span.split(at)
        self.nbytes += first.nbytes + rest.nbytes - node.span.nbytes
        tail = _Node(node.tokens[at:], rest, node, node.used, node.children)
        for child in tail.children.values():
            child.parent = tail
        node.tokens, node.span, node.children = node.tokens[:at], first, {tail.tokens[0]: tail}
        self._size += 1
        self._note_end(tail)

    def _attach(self, parent: _Node[S] | None, tokens: tuple[int, ...], span: S) -> None:
        node = _Node(tokens, span, parent, self._uses)
        self._siblings(parent)[tokens[0]] = node
        self.nbytes += span.nbytes
        self._size += 1
        self._note_end(node)

    def _remove(self, node: _Node[S]) -> None:
        del self._siblings(node.parent)[node.tokens[0]]
        self.nbytes -= node.span.nbytes
        self._size -= 1
        if node.parent is not None:
            self._note_end(node.parent)

    def _siblings(self, parent: _Node[S] | None) -> dict[int, _Node[S]]:
        return self._children if parent is None else parent.children

    # --- which end goes first -----------------------------------------------------------------------------

    def _note_end(self, node: _Node[S]) -> None:
        if node.children:
            return
        heapq.heappush(self._ends, (node.used, id(node), node))
        if len(self._ends) > 4 * self._size + 64:
            self._ends = [entry for entry in self._ends if self._is_current(entry[0], entry[2])]
            heapq.heapify(self._ends)

    def _is_current(self, used: int, node: _Node[S]) -> bool:
        is_stored = self._siblings(node.parent).get(node.tokens[0]) is node
        return is_stored and node.used == used and not node.children


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix; both of the same kind of sequence."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # one[:low] is shared, one[:high] is not
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
