"""Numbers of tokens whose products with a matrix take no longer than those of fewer: what steps are padded to on a CPU.

A BLAS makes products in blocks of tokens and takes its time with what is left beside them: on some processors 14 tokens
take a third longer than 16 (docs/benchmarks.md has the figures). Whether they do here is measured, not assumed.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from worker import backend
from worker.cache.layout import UNPADDED, StepSizes

BLOCK = 8  # tokens
BLOCKED = StepSizes(tokens for tokens in range(1, 65) if tokens % BLOCK <= BLOCK // 2)  # nearly whole blocks are filled
_COMPARED = 2 * BLOCK - 2, 2 * BLOCK
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
    """`BLOCKED` if whole blocks of tokens are no slower than a little less; `run` makes products, returns seconds."""
    taken = [[run(tokens) for tokens in _COMPARED] for _ in range(_REPEATS)][1:]  # the first of all warms up
    partial_s, whole_s = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    return BLOCKED if whole_s <= partial_s else UNPADDED


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
