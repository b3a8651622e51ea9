"""Where the last tokens of a row stood before in a text: the longest match, all its places, what followed there.

Chains of places that share their last n tokens, as LZ77 compressors keep them, in flat arrays. A suffix automaton
answers the same question at 300 to 500 bytes a token in CPython; this takes 24 to 36, and 2 to 3 µs to add one.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

SIZES = (4, 2, 1)  # n of the n-grams whose places are chained, largest first
MOST_PLACES = 16  # so many of the latest places of an n-gram are looked at
LONGEST_SEARCHED = 64  # a match that is found is not measured beyond this; one that goes on grows without limit
NO_TOKEN = -1  # between two texts: matches nothing, follows nothing
TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens of a row stand in a text before each of `places`, the latest first."""

    length: int
    places: Sequence[int]

    def advance(self, text: Sequence[int], token: int) -> "Match":
        """The match after the row got `token`: at those places where the text goes on with it, too."""
        places = [place + 1 for place in self.places if place < len(text) and text[place] == token]
        return Match(self.length + 1, places) if places else NO_MATCH


NO_MATCH = Match(0, ())


@dataclass(frozen=True, slots=True)
class Continuation:
    """What may follow a row. `chances`: that each token is right, given that those before it are."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    @property
    def expected(self) -> float:
        """How many of the tokens are right on average."""
        return sum(accumulate(self.chances, mul))


class Occurrences:
    """The places of a text's n-grams. A place is the position after one, where its successor stands.

    `capacity`: tokens that it is made for; a longer text makes it anew at twice the size. It takes
    `bytes_for(capacity)`.
    """

    def __init__(self, capacity: int) -> None:
        self._start(capacity)

    @staticmethod
    def bytes_for(capacity: int) -> int:
        """Bytes of an index of `capacity` tokens, once full."""
        return len(SIZES) * TOKEN_BYTES * (capacity + _slots_for(capacity))

    def _start(self, capacity: int) -> None:
        slots = _slots_for(capacity)
        self.capacity = capacity
        self.indexed = 1  # places below are indexed; 0 is none
        self._mask = slots - 1
        self._latest = [array("i", [0]) * slots for _ in SIZES]  # by hash of the n-gram
        self._before = [array("i", [0]) for _ in SIZES]  # by place: the one before in its chain

    def extend(self, text: Sequence[int]) -> None:
        """Index what is new in `text`, but not its end, which has no successor yet."""
        if len(text) > self.capacity:
            self._start(2 * len(text))
        mask = self._mask
        chains = list(zip(SIZES, self._latest, self._before, strict=True))
        for place in range(self.indexed, len(text)):
            for size, latest, before in chains:
                slot = hash(tuple(text[max(place - size, 0) : place])) & mask
                before.append(latest[slot])
                latest[slot] = place
        self.indexed = max(self.indexed, len(text))

    def follow(self, text: Sequence[int], match: Match, row: Sequence[int], seen: int) -> Match:
        """The match of the row's end, given `match` of its first `seen` tokens in the same text.

        A long one that goes on needs no search: where the longer one occurs, there the shorter one did.
        """
        for token in row[seen:]:
            match = match.advance(text, token)
            if not match.places:
                break
        return match if match.length > SIZES[0] else self.find(text, row)

    def find(self, text: Sequence[int], row: Sequence[int]) -> Match:
        """The longest match of the row's end in `text`, among the latest places of the largest n-gram found."""
        for level, size in enumerate(SIZES):
            if size <= len(row):
                match = self._longest(text, row, size, self._chain(level, row))
                if match.places:
                    return match
        return NO_MATCH

    def _chain(self, level: int, row: Sequence[int]) -> list[int]:
        """The latest places of the row's last n-gram, and perhaps of others with its hash."""
        place = self._latest[level][hash(tuple(row[len(row) - SIZES[level] :])) & self._mask]
        before = self._before[level]
        places: list[int] = []
        while place and len(places) < MOST_PLACES:
            places.append(place)
            place = before[place]
        return places

    def _longest(self, text: Sequence[int], row: Sequence[int], least: int, places: Sequence[int]) -> Match:
        """Those of `places` before which most tokens are the row's last ones, `least` at least."""
        longest, best = least, list[int]()
        for place in places:
            length = common_suffix(text, place, row, longest)
            if length > longest:
                longest, best = length, [place]
            elif length == longest:
                best.append(place)
        return Match(longest, best)


def common_suffix(text: Sequence[int], place: int, row: Sequence[int], least: int) -> int:
    """How many tokens before `place` are the row's last ones, up to LONGEST_SEARCHED; 0 if fewer than `least`."""
    most = min(place, len(row), LONGEST_SEARCHED)
    if most < least or text[place - least] != row[-least]:
        return 0
    length = 0
    while length < most and text[place - length - 1] == row[-length - 1]:
        length += 1
    return length if length >= least else 0


def continuation(text: Sequence[int], match: Match, limit: int, doubt: float, least_reach: float) -> Continuation:
    """At most `limit` tokens along the likeliest path: at each, what most places go on with, of equals the latest.

    A token that followed at v of n places, after a match of L tokens, is right with chance v / (n + doubt / L). The
    path ends before the token, other than the first, that is reached and right with a chance below `least_reach`.
    The text may be the row itself: a path that comes to its end goes on with what was copied first, that is, with its
    period. (SuffixDecoding, arXiv 2411.04975, has a tree of all paths; this walks the best one.)
    """
    tokens: list[int] = []
    chances: list[float] = []
    places, reach = match.places, 1.0
    while len(tokens) < limit:
        token, followed = _commonest(text, tokens, places)
        chance = len(followed) / (len(places) + doubt / (match.length + len(tokens)))
        reach *= chance
        if token == NO_TOKEN or (tokens and reach < least_reach):
            break
        tokens.append(token)
        chances.append(chance)
        places = followed
    return Continuation(tuple(tokens), tuple(chances))


def _commonest(text: Sequence[int], tokens: Sequence[int], places: Sequence[int]) -> tuple[int, Sequence[int]]:
    """The token that stands most often `len(tokens)` behind the places, and those of them where it does."""
    if len(places) == 1:
        return _at(text, tokens, places[0]), places
    followers: dict[int, list[int]] = {}
    for place in places:
        followers.setdefault(_at(text, tokens, place), []).append(place)
    return max(followers.items(), key=lambda item: len(item[1]))


def _at(text: Sequence[int], tokens: Sequence[int], place: int) -> int:
    """The token `len(tokens)` behind a place, where `tokens` continue the text."""
    at = place + len(tokens)
    return text[at] if at < len(text) else tokens[at - len(text)]


def _slots_for(capacity: int) -> int:
    return 1 << max(capacity - 1, 1).bit_length()
