"""Keys and values of what was read before, for requests that begin the same: the next turn of a chat, a system prompt.

Copies of slots, in a radix tree: a step writes to the slots in place, which a kept reference would turn into copying
them whole.
"""

from dataclasses import dataclass, field

import mlx.core as mx

from worker.cache.spans import KVSpan, joined
from worker.prefix_tree import PrefixTree
from worker.request import Row
from worker.target import Target

LEAST_TOKENS = 16  # less is read again sooner than it is copied
USUAL_BYTES = 512 << 20  # where memory has no limit
USUAL_SHARE = 4  # the part of the KV cache's limit that is used, 1/4


@dataclass(slots=True)
class PrefixCache:
    """One model's prefixes. `wanted_bytes` None: a share of the KV cache's limit; 0: nothing is kept.

    Belongs to the thread that loaded the model; other threads may read the counters.
    """

    wanted_bytes: int | None = 0
    lookups: int = 0
    hits: int = 0
    hit_tokens: int = 0
    budget_bytes: int = field(init=False)
    tree: PrefixTree[KVSpan] = field(default_factory=PrefixTree)
    _fresh: list[KVSpan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget_bytes = budget(self.wanted_bytes, None, 0)

    @property
    def is_on(self) -> bool:
        return self.wanted_bytes != 0

    def recall(self, target: Target, row: Row) -> None:
        """Let a row that has read nothing itself begin with what is known of its tokens, but for the pending one."""
        pieces = self.tree.find(row.tokens[:-1])
        found = sum(piece.tokens for piece in pieces)
        if found - row.cached < LEAST_TOKENS:
            return
        target.insert(row.slot, joined([(piece.span, piece.tokens) for piece in pieces]))
        self.hits += not row.recalled
        self.hit_tokens += found - row.cached
        row.cached = row.recalled = found

    def keep(self, target: Target, row: Row, tokens: int | None = None) -> None:
        """Store the first `tokens` (default: all) of what a row has in its slot; `settle` before the next step."""
        known = row.tokens[: row.cached if tokens is None else tokens]
        if len(known) < LEAST_TOKENS or not self.budget_bytes:
            return

        def copy(start: int, end: int) -> KVSpan:
            span = target.extract(row.slot, start, end)
            self._fresh.append(span)
            return span

        self.tree.insert(known, copy, target.span_bytes_per_token, self.budget_bytes, LEAST_TOKENS)

    def settle(self) -> None:
        """Make the copies that were asked for; one evaluation for all."""
        if self._fresh:
            mx.eval([span.stacks for span in self._fresh])
            self._fresh = []

    def forget(self) -> None:
        """Drop all that is remembered; what comes later is kept as before."""
        self.tree.fit(0)

    def fit(self, limit_bytes: int | None, slots_bytes: int) -> None:
        """Leave the rows' slots what they need of the memory for keys and values."""
        self.budget_bytes = budget(self.wanted_bytes, limit_bytes, slots_bytes)
        self.tree.fit(self.budget_bytes)


def budget(wanted_bytes: int | None, limit_bytes: int | None, slots_bytes: int) -> int:
    """Bytes for prefixes beside slots of `slots_bytes`: at most what is wanted, and what the limit leaves."""
    if limit_bytes is None:
        return USUAL_BYTES if wanted_bytes is None else wanted_bytes
    wanted = limit_bytes // USUAL_SHARE if wanted_bytes is None else wanted_bytes
    return max(min(wanted, limit_bytes - slots_bytes), 0)
