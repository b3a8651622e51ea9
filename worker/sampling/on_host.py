"""The choice on a CPU, where it is the work that counts: row by row, and of each row only what can matter.

The vocabulary is passed over a few times by numpy, in the row's own logits; all the rest is done with the few tokens
that the filters leave, or whose noise may lift them to the top.
"""

from collections.abc import Sequence

import numpy as np

from common.sampling import Sampling
from worker.sampling import noise
from worker.sampling.noise import Array, Exponentials

_ROUNDING = 1e-5  # by which a bound on float32 logits is taken lower, as a share of it


def chosen(logits: Array, draws: Sequence[tuple[Sampling, int]], vocabulary: int, columns: Array | None) -> list[int]:
    """The place of the chosen token in each row of `logits`, float32 [draws, columns]; -1 where they are not finite.

    `draws`: sampling parameters and position of each. `columns`: the token ids of the places, None: all in order.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        is_finite = np.isfinite(logits.sum(axis=-1)).tolist()
    return [
        _choice(row, sampling, position, vocabulary, columns) if is_good else -1
        for row, (sampling, position), is_good in zip(logits, draws, is_finite, strict=True)
    ]


def _choice(logits: Array, sampling: Sampling, position: int, vocabulary: int, columns: Array | None) -> int:
    top = int(logits.argmax())
    if sampling.is_greedy:
        return top
    exponentials = Exponentials(noise.noise_key(sampling.seed, position), vocabulary)
    if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p:
        places = _left(logits, float(logits[top]), sampling)
    else:
        places = _able_to_win(logits, top, sampling.temperature, exponentials, columns)
    scores = _scores(logits, places, sampling.temperature, exponentials, columns)
    return int(places[scores.argmax()])


def _scores(
    logits: Array, places: Array, temperature: float, exponentials: Exponentials, columns: Array | None
) -> Array:
    """What the tokens at these places compete with, float64 [places]."""
    ids = places if columns is None else columns[places]
    scores: Array = logits[places].astype(np.float64) / temperature - np.log(exponentials.of(ids))
    return scores


def _able_to_win(
    logits: Array, top: int, temperature: float, exponentials: Exponentials, columns: Array | None
) -> Array:
    """Places of the tokens that would beat the likeliest one if their exponential were the least of their block."""
    (beaten,) = _scores(logits, np.array([top]), temperature, exponentials, columns).tolist()
    bounds = (beaten + np.log(exponentials.least)) * temperature
    bounds = (bounds - _ROUNDING * (1.0 + np.abs(bounds))).astype(np.float32)
    by_place = np.repeat(bounds, noise.BLOCK)[: len(logits)] if columns is None else bounds[noise.block_of(columns)]
    return np.flatnonzero(logits >= by_place)


def _left(logits: Array, highest: float, sampling: Sampling) -> Array:
    """Places of the tokens that top-k, min-p and top-p leave, in that order; those as likely as the last one stay."""
    floor = -np.inf
    if 0 < sampling.top_k < len(logits):
        floor = float(np.partition(logits, -sampling.top_k)[-sampling.top_k])
    if sampling.min_p:
        floor = max(floor, highest + sampling.temperature * float(np.log(sampling.min_p)))
    places = np.arange(len(logits)) if floor == -np.inf else np.flatnonzero(logits >= np.float32(floor))
    if sampling.top_p >= 1.0:
        return places
    weights = np.exp((logits[places] - np.float32(highest)) * np.float32(1.0 / sampling.temperature))
    nucleus: Array = places[weights >= _nucleus_floor(weights, sampling.top_p)]
    return nucleus


def _nucleus_floor(weights: Array, top_p: float) -> float:
    """The largest weight such that those who have it or more come to the share `top_p` of all.

    Looked for among the weights that are not so small that even all of them together could be left out.
    """
    total = float(weights.sum(dtype=np.float64))
    large = weights[weights >= (1.0 - top_p) * total / len(weights)]
    descending = np.sort(large)[::-1]
    reached = np.cumsum(descending, dtype=np.float64)
    return float(descending[min(int(np.searchsorted(reached, top_p * total)), len(descending) - 1)])
