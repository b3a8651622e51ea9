"""Numbers of tokens whose products with a matrix take no longer than those of fewer: what steps are padded to on a CPU.

A BLAS makes products in blocks of tokens and takes its time with what is left beside them: on some processors 10 tokens
take longer than 16 (docs/benchmarks.md has the figures). Whether they do here is measured, not assumed.
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
_FASTER = 0.95  # a product of fewer tokens than a whole block has to take so much less at least
_REPEATS = 9
_MATRICES, _INPUTS, _OUTPUTS = 16, 512, 1536  # 48 MiB in all: as in a model, none is in the cache when it is needed
_AT_ONCE = 8  # products that are waited for together


@cache
def worthwhile() -> StepSizes:
    """What to pad steps to on the default device; measured at the first call, which takes a fifth of a second."""
    if backend.name() != "cpu" or not backend.has_openblas():
        return UNPADDED
    return chosen(_product())


def chosen(run: Callable[[int], float]) -> StepSizes:
    """Whole blocks of tokens, and those tokens beside a whole block that are faster than one more of them would be.

    `run` makes products with so many tokens and returns the seconds.
    """
    compared = [BLOCK + beside for beside in _BESIDE] + [2 * BLOCK]
    taken = [[run(tokens) for tokens in compared] for _ in range(_REPEATS)][1:]  # the first of all warms up
    *partial_s, whole_s = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    faster = [beside for beside, seconds in zip(_BESIDE, partial_s, strict=True) if seconds < _FASTER * whole_s]
    return UNPADDED if len(faster) == len(_BESIDE) else blocked(tuple(faster))


def blocked(faster: Collection[int]) -> StepSizes:
    """Whole blocks, and besides as many tokens as are `faster`; up to half a block, where other work is what counts."""
    as_timed = {
        beside: min((timed for timed in _BESIDE if timed >= beside), default=BLOCK) for beside in range(1, BLOCK)
    }
    kept = [0, *(beside for beside, timed in as_timed.items() if timed in faster)]
    return StepSizes(n for n in range(1, _LARGEST + 1) if n <= BLOCK // 2 or (n >= BLOCK and n % BLOCK in kept))


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
