"""The n-gram drafter: what followed the longest match of the row's own last tokens, in its prompt and output."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.drafters.drafter import CopyingDrafter, Offer
from worker.request import Row

MIN_MATCH = 1
_NO_POSITION = -1


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of a row last ended; grows with the row."""

    indexed: int = 0
    last_end: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, tokens: Sequence[int], longest: int) -> None:
        """Index all n-grams but those that end with the last token, which has no successor yet."""
        for end in range(max(self.indexed, 1), len(tokens)):
            for size in range(MIN_MATCH, min(longest, end) + 1):
                self.last_end[tuple(tokens[end - size : end])] = end
        self.indexed = max(self.indexed, len(tokens))


class NgramDrafter(CopyingDrafter):
    """Prompt lookup decoding (Saxena, 2023): copies from the row itself, at no cost to the device."""

    name = "ngram"

    def __init__(self, longest_match: int) -> None:
        self.longest_match = longest_match
        self.indexes: dict[str, NgramIndex] = {}

    def offer(self, row: Row, limit: int) -> Offer | None:
        index = self.indexes.setdefault(row.id, NgramIndex())
        tokens = row.tokens
        index.extend(tokens, self.longest_match)
        for size in range(min(self.longest_match, len(tokens) - 1), MIN_MATCH - 1, -1):
            end = index.last_end.get(tuple(tokens[-size:]), _NO_POSITION)
            if end != _NO_POSITION:
                return Offer(self.name, limit, size, continuation(tokens, end, limit))
        return None

    def forget(self, row: Row, *, is_finished: bool) -> None:
        self.indexes.pop(row.id, None)


def continuation(tokens: Sequence[int], end: int, limit: int) -> tuple[int, ...]:
    """What follows position `end`; a continuation that reaches the end of the row repeats with its period."""
    period = len(tokens) - end
    return tuple(tokens[end + i % period] for i in range(limit))
