"""What the suffix drafter remembers of a scope: its latest outputs, in two generations of bounded size."""

from array import array
from collections.abc import Iterator, Sequence

from worker.drafters.occurrences import NO_TOKEN, TOKEN_BYTES, Occurrences

GENERATION_TOKENS = 1 << 16
CONTEXT_TOKENS = 8  # of the prompt's end, so that a match can reach into an output from its first token on


class Generation:
    """Outputs one after the other, with the places of their n-grams; holds at most `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.text = array("i")
        self.places = Occurrences(capacity)

    def has_room(self, count: int) -> bool:
        return len(self.text) + count <= self.capacity

    def add(self, tokens: Sequence[int]) -> None:
        self.text.extend(tokens)
        self.places.extend(self.text)


class Memory:
    """The latest outputs of one scope. When the young generation is full the old one is dropped and it takes its place.

    Takes at most `bytes_for(generation_tokens)`: two generations.
    """

    def __init__(self, generation_tokens: int = GENERATION_TOKENS) -> None:
        self._generation_tokens = generation_tokens
        self.young = Generation(generation_tokens)
        self.old: Generation | None = None

    @staticmethod
    def bytes_for(generation_tokens: int) -> int:
        """Bytes of a memory with both generations full."""
        return 2 * (TOKEN_BYTES * generation_tokens + Occurrences.bytes_for(generation_tokens))

    def generations(self) -> Iterator[Generation]:
        """The young one, then the old one if there is one."""
        yield self.young
        if self.old is not None:
            yield self.old

    def add(self, tokens: Sequence[int]) -> None:
        """Remember an output, of one too long for a generation its end."""
        kept = [*tokens[max(len(tokens) - self._generation_tokens + 1, 0) :], NO_TOKEN]
        if not self.young.has_room(len(kept)):
            self.old, self.young = self.young, Generation(self._generation_tokens)
        self.young.add(kept)
