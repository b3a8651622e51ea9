"""Numbers of tokens whose products with a matrix take no longer than those of fewer: what steps are padded to on a CPU.

A BLAS makes products in blocks of tokens and takes its time with what is left beside them: on some processors 10 tokens
take longer than 16 (docs/measurements.md has the figures). Whether they do here is measured, not assumed.
"""

import statistics
import time
from collections.abc import Callable, Collection
from functools import cache

import mlx.core as mx
import numpy as np

from worker import backend
from worker.cache.layout import UNPADDED, StepSizes

BLOCK = 8  # tokens
_LARGEST = 64  # tokens: of more those beside whole blocks are few
_BESIDE = 2, 4, 6  # tokens beside a whole block that are timed; what is between them is as the next of them
_FASTER = 0.95  # a product of fewer tokens than whole blocks has to take so much less at least …
_FASTER_SMALL = 1.05  # … or no more than this, of less than one block: there other work, which grows, is a larger part
_REPEATS = 9
_MATRICES, _INPUTS, _OUTPUTS = 16, 512, 1536  # 48 MiB in all: as in a model, none is in the cache when it is needed
_AT_ONCE = 8  # products that are waited for together


@cache
def worthwhile() -> StepSizes:
    """What to pad steps to on the default device; measured at the first call, which takes a third of a second."""
    if backend.name() != "cpu" or not backend.has_openblas():
        return UNPADDED
    return chosen(_product())


def chosen(run: Callable[[int], float]) -> StepSizes:
    """Whole blocks of tokens, and those numbers beside them that are faster than a whole block more would be.

    `run` makes products with so many tokens and returns the seconds. One token alone is always faster.
    """
    small = _faster(run, 0, _FASTER_SMALL)
    faster = _faster(run, BLOCK, _FASTER)
    return UNPADDED if len(small) == len(faster) == len(_BESIDE) else blocked(faster, small)


def _faster(run: Callable[[int], float], blocks: int, limit: float) -> list[int]:
    """Which of `_BESIDE` take less than `limit` times a block more, each beside so many tokens in whole blocks."""
    compared = [blocks + beside for beside in _BESIDE] + [blocks + BLOCK]
    taken = [[run(tokens) for tokens in compared] for _ in range(_REPEATS)][1:]  # the first of all warms up
    *partial_s, whole_s = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    return [beside for beside, seconds in zip(_BESIDE, partial_s, strict=True) if seconds < limit * whole_s]


def blocked(faster: Collection[int], small: Collection[int]) -> StepSizes:
    """Whole blocks, and besides as many tokens as are `faster`; and one token, or `small` numbers of them."""
    beside, alone = _kept(faster), {*_kept(small), 1}
    return StepSizes(n for n in range(1, _LARGEST + 1) if (n % BLOCK in beside if n >= BLOCK else n in alone))


def _kept(timed: Collection[int]) -> set[int]:
    """Numbers of tokens beside whole blocks that are like these, each like the next one that was timed; and none."""
    next_timed = {n: min((one for one in _BESIDE if one >= n), default=BLOCK) for n in range(1, BLOCK)}
    return {0, *(n for n, one in next_timed.items() if one in timed)}


def _product() -> Callable[[int], float]:
    matrices = [mx.array(np.ones((_INPUTS, _OUTPUTS), np.float32)) for _ in range(_MATRICES)]
    made = 0

    def run(tokens: int) -> float:
        nonlocal made
        x = mx.ones((tokens, _INPUTS))
        mx.eval(x)
        used = [matrices[(made + i) % _MATRICES] for i in range(_AT_ONCE)]
        made += _AT_ONCE
        began = time.perf_counter()
        mx.eval([x @ matrix for matrix in used])
        return time.perf_counter() - began

    return run
