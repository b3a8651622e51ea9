"""Where the last tokens of a row stood before in a text: the longest match, all its places, what followed there.

Chains of places that share their last n tokens, as LZ77 compressors keep them, in flat arrays. A suffix automaton
answers the same question at 300 to 500 bytes a token in CPython; this takes 24 to 36, and 1 to 5 µs to add one, less
if many come at once.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul

import msgspec
import numpy as np

SIZES = (4, 2, 1)  # n of the n-grams whose places are chained, largest first
_LONGER = (1 << 30, *SIZES)  # what is longer than the matches that are found by the n-gram of each size alone
MOST_PLACES = 16  # so many of the latest places of an n-gram are looked at
LONGEST_SEARCHED = 64  # a match that is found is not measured beyond this; one that goes on grows without limit
NO_TOKEN = -1  # between two texts: matches nothing, follows nothing
TOKEN_BYTES = array("i").itemsize
_FACTORS = (2654435761, 2246822519, 3266489917, 668265263)  # of an n-gram's hash, its last token first
_SHIFT = 15  # the best of a product's bits lie higher; four products fit 63 bits for tokens below 2^29
_FEW = 6  # tokens are indexed one by one up to so many


class Match(msgspec.Struct, frozen=True, gc=False):
    """The last `length` tokens of a row stand in a text before each of `places`, the latest first."""

    length: int
    places: Sequence[int]

    def advance(self, text: Sequence[int], token: int) -> "Match":
        """The match after the row got `token`: at those places where the text goes on with it, too."""
        places = [place + 1 for place in self.places if place < len(text) and text[place] == token]
        return Match(self.length + 1, places) if places else NO_MATCH


NO_MATCH = Match(0, ())


class Continuation(msgspec.Struct, frozen=True, gc=False):
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
        few = len(text) if len(text) - self.indexed <= _FEW else max(self.indexed, SIZES[0])
        for place in range(self.indexed, min(few, len(text))):
            for slot, latest, before in zip(self._slots(text, place), self._latest, self._before, strict=True):
                if slot is None:
                    before.append(0)
                else:
                    before.append(latest[slot])
                    latest[slot] = place
        if few < len(text):
            self._extend_by_many(text, few)
        self.indexed = max(self.indexed, len(text))

    def _extend_by_many(self, text: Sequence[int], first: int) -> None:
        """From place `first` on, which is behind the first n-gram of each size."""
        tokens = np.array(text[first - SIZES[0] : len(text) - 1], dtype=np.int64)
        products = [tokens[SIZES[0] - 1 - i : len(tokens) - i] * factor for i, factor in enumerate(_FACTORS)]
        for size, latest, before in zip(SIZES, self._latest, self._before, strict=True):
            slots = (np.sum(products[:size], axis=0) >> _SHIFT) & self._mask
            for place, slot in enumerate(slots.tolist(), first):
                before.append(latest[slot])
                latest[slot] = place

    def _slots(self, text: Sequence[int], end: int) -> tuple[int | None, int | None, int | None]:
        """Where the latest places of the n-grams before `end` are noted, of each of `SIZES`; None: it is too short."""
        mask, one = self._mask, text[end - 1] * _FACTORS[0]
        if end < 2:
            return None, None, one >> _SHIFT & mask
        two = one + text[end - 2] * _FACTORS[1]
        if end < 4:
            return None, two >> _SHIFT & mask, one >> _SHIFT & mask
        four = two + text[end - 3] * _FACTORS[2] + text[end - 4] * _FACTORS[3]
        return four >> _SHIFT & mask, two >> _SHIFT & mask, one >> _SHIFT & mask

    def follow(self, text: Sequence[int], match: Match, row: Sequence[int], seen: int, least: int = 1) -> Match:
        """The match of the row's end, given `match` of its first `seen` tokens in the same text.

        A long one that goes on needs no search: where the longer one occurs, there the shorter one did. Not searched
        for are those shorter than `least`.
        """
        for token in row[seen:]:
            match = match.advance(text, token)
            if not match.places:
                break
        return match if match.length > SIZES[0] else self.find(text, row, least)

    def find(self, text: Sequence[int], row: Sequence[int], least: int = 1) -> Match:
        """The longest match of the row's end in `text`, among the latest places of the largest n-gram found; one
        shorter than `least` may be missed."""
        slots = self._slots(row, len(row)) if row else ()
        for size, longer, slot, latest, before in zip(SIZES, _LONGER, slots, self._latest, self._before, strict=False):
            if longer <= least:
                break
            if slot is not None and (place := latest[slot]):
                match = self._longest(text, row, size, _chain(before, place))
                if match.places:
                    return match
        return NO_MATCH

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


def _chain(before: Sequence[int], place: int) -> list[int]:
    """The latest places of an n-gram, from `place` on, and perhaps of others with its hash."""
    places: list[int] = []
    while place and len(places) < MOST_PLACES:
        places.append(place)
        place = before[place]
    return places


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
    if len(match.places) == 1 and match.places[0] + limit <= len(text):
        return _alone(text, match.places[0], _lone_chances(match.length, limit, doubt, least_reach))
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


def _alone(text: Sequence[int], place: int, chances: tuple[float, ...]) -> Continuation:
    """What followed at one place alone."""
    tokens = tuple(text[place : place + len(chances)])
    if NO_TOKEN in tokens:
        tokens = tokens[: tokens.index(NO_TOKEN)]
    return Continuation(tokens, chances[: len(tokens)])


@lru_cache(maxsize=1024)
def _lone_chances(length: int, limit: int, doubt: float, least_reach: float) -> tuple[float, ...]:
    """Chances of the tokens after a match at one place, down to the least one."""
    chances = [1.0 / (1.0 + doubt / (length + i)) for i in range(limit)]
    reaches = accumulate(chances, mul)
    return tuple(
        chance for i, (chance, reach) in enumerate(zip(chances, reaches, strict=True)) if not i or reach >= least_reach
    )


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
