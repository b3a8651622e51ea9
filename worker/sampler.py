"""The target's own token at each position: a pure function of logits, sampling parameters, seed and position.

Coupled sampling (drafter-invariant speculative sampling, arXiv 2408.07978): the noise of a draw depends on the
request's seed and the token's position alone, so the outcome is the same whatever drafter, draft length or batch led
there, and a replay repeats it.

The order of processing: logit bias, penalties, temperature, top-k, top-p and min-p, noise.
"""

from collections.abc import Sequence

import mlx.core as mx
import msgspec

from common.sampling import Sampling
from worker.tally import Tally, adjusted

_BISECTIONS = 26  # narrows a threshold to float32's resolution of a probability
_MASK_64 = 2**64 - 1


class Draw(msgspec.Struct, frozen=True, gc=False):
    """One token to choose: with which parameters, and at which absolute position of its row.

    `tally` has the biases and penalties of the row's own tokens, if it uses any; `draft` are the draft tokens between
    those and this position. `logprobs` is the number of alternatives whose log-probabilities are asked for, or None.
    """

    sampling: Sampling
    position: int
    tally: Tally | None = None
    draft: tuple[int, ...] = ()
    logprobs: int | None = None


def choose(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """Token ids int32 [draws] for logits [draws, vocabulary], not evaluated; -1 where the logits are not finite."""
    tokens = _chosen(adjusted(logits, [(draw.tally, draw.draft) for draw in draws]), draws)
    is_finite = mx.isfinite(logits.astype(mx.float32).sum(axis=-1))
    return mx.where(is_finite, tokens.astype(mx.int32), -1)


def _chosen(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    sampled = [i for i, draw in enumerate(draws) if not draw.sampling.is_greedy]
    if len(sampled) == len(draws):
        return _sample(logits, draws)
    tokens = mx.argmax(logits, axis=-1)
    if sampled:
        rows = mx.array(sampled, dtype=mx.int32)
        tokens[rows] = _sample(logits[rows], [draws[i] for i in sampled])
    return tokens


def _sample(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    temperature = mx.array([draw.sampling.temperature for draw in draws])[:, None]
    scaled = logits.astype(mx.float32) / temperature
    kept = _filtered(scaled, [draw.sampling for draw in draws])
    return mx.argmax(kept + gumbel(draws, logits.shape[-1]), axis=-1).astype(mx.uint32)


def gumbel(draws: Sequence[Draw], vocabulary: int) -> mx.array:
    """Gumbel noise float32 [draws, vocabulary], a function of each draw's (seed, position)."""
    keys = mx.array([noise_key(draw.sampling.seed, draw.position) for draw in draws], dtype=mx.uint32)
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocabulary,), key=key))(keys)
    return noise


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """The two words of a draw's random key: a mix of the seed's 64 bits (splitmix64), and the position."""
    mixed = (seed + 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return (mixed ^ (mixed >> 31)) & 0xFFFFFFFF, position & 0xFFFFFFFF


def _filtered(scaled: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    """`scaled` with what top-k, top-p and min-p cut set to -inf. A row that uses none of them is left as it is."""
    rows = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1.0 or s.min_p]
    if not rows:
        return scaled
    if len(rows) == len(samplings):
        return _cut(scaled, samplings)
    index = mx.array(rows, dtype=mx.int32)
    filtered = mx.array(scaled)
    filtered[index] = _cut(scaled[index], [samplings[i] for i in rows])
    return filtered


def _cut(scaled: mx.array, samplings: Sequence[Sampling]) -> mx.array:
    weights = mx.exp(scaled - scaled.max(axis=-1, keepdims=True))  # 1 for the most probable token
    floor = mx.array([s.min_p for s in samplings])[:, None]
    if any(s.top_k for s in samplings):
        wanted = mx.array([float(s.top_k or scaled.shape[-1]) for s in samplings])[:, None]
        floor = mx.maximum(floor, _threshold(weights, mx.ones_like(weights), wanted))
    if any(s.top_p < 1.0 for s in samplings):
        inside = mx.where(weights >= floor, weights, 0.0)
        share = mx.array([s.top_p for s in samplings])[:, None]
        nucleus = _threshold(weights, inside, share * inside.sum(axis=-1, keepdims=True))
        floor = mx.maximum(floor, mx.where(share < 1.0, nucleus, 0.0))
    return mx.where(weights >= floor, scaled, -mx.inf)


def _threshold(weights: mx.array, amounts: mx.array, wanted: mx.array) -> mx.array:
    """The largest t (to float resolution) whose tokens {weight ≥ t} together have the wanted amount; [rows, 1].

    Found by bisection: some 26 passes, a fraction of what sorting the vocabulary costs.
    """
    low, high = mx.zeros_like(wanted), mx.full(wanted.shape, 1.0 + 2.0**-20)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_enough = mx.where(weights >= middle, amounts, 0.0).sum(axis=-1, keepdims=True) >= wanted
        low, high = mx.where(is_enough, middle, low), mx.where(is_enough, high, middle)
    return low
