"""The noise of draws: a function of the request's seed, the token's position and the token's id, and of nothing else.

A token is drawn as the one of greatest logit / temperature - log(E), where each has a standard exponential E of its own
(the Gumbel-max trick). The exponentials of `BLOCK` neighbouring ids are made of the least of them, the place where it
stands and the rest above it, which for exponentials is the same thing, as they have no memory. So a bound on all of
them is known from few, and those of tokens that cannot win need not be made.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 64
_BLOCK_BITS = 6
_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST_BLOCK = 1 << 40  # the words of blocks come behind those of all ids


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """The two 32-bit words of a draw's random key."""
    mixed = _mixed(_mixed(seed & _MASK_64) + position & _MASK_64)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _mixed(word: int) -> int:
    """One output of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    word = word + _GOLDEN & _MASK_64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK_64
    return word ^ word >> 31


class Exponentials:
    """Those of one draw with key `key`, for ids below `vocabulary`.

    `least`: a bound below the exponentials of each block of ids, float64 [blocks].
    """

    def __init__(self, key: tuple[int, int], vocabulary: int) -> None:
        self._start = key[0] << 32 | key[1]
        blocks = np.arange(-(-vocabulary // BLOCK), dtype=np.uint64)
        words = self._words(blocks + np.uint64(_FIRST_BLOCK))
        self.least = _exponential(words) / BLOCK
        self._places = words & np.uint64(BLOCK - 1)

    def of(self, ids: Array) -> Array:
        """The exponentials of these ids, float64 [ids]."""
        ids = ids.astype(np.uint64)
        blocks = block_of(ids)
        is_least = self._places[blocks] == ids & np.uint64(BLOCK - 1)
        more: Array = np.where(is_least, 0.0, _exponential(self._words(ids)))
        return self.least[blocks] + more

    def _words(self, indexes: Array) -> Array:
        """Those outputs of splitmix64 from the key on, uint64 [indexes]."""
        words = indexes * np.uint64(_GOLDEN) + np.uint64(self._start)
        words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        mixed: Array = words ^ words >> np.uint64(31)
        return mixed


def block_of(ids: Array) -> Array:
    """The block of each id."""
    blocks: Array = ids >> ids.dtype.type(_BLOCK_BITS)
    return blocks


def _exponential(words: Array) -> Array:
    """A standard exponential of each word's upper 53 bits; never 0."""
    exponential: Array = -np.log1p(-((words >> np.uint64(11)) + 0.5) * 2.0**-53)
    return exponential
