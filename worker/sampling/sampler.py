"""The target's own token at each position: a pure function of logits, sampling parameters, seed and position.

Coupled sampling (drafter-invariant speculative sampling, arXiv 2408.07978): the noise of a draw depends on the
request's seed and the token's position alone, so the outcome is the same whatever drafter, draft length or batch led
there, and a replay repeats it.

The order of processing: logit bias, penalties, temperature, top-k, top-p and min-p, noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import msgspec
import numpy as np

from common.sampling import Sampling
from worker import backend
from worker.cache.layout import padded_tokens
from worker.sampling import on_host
from worker.sampling.noise import Array, noise_key
from worker.sampling.tally import Tally, adjusted

_BISECTIONS = 26  # narrows a threshold to float32's resolution of a probability


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


@dataclass(frozen=True, slots=True)
class Part:
    """Some tokens of a vocabulary: their ids `columns`, and how many tokens there are in all."""

    columns: mx.array
    vocabulary: int

    @property
    def ids(self) -> Array:
        """`columns` for the host."""
        return np.array(self.columns, copy=False)


def choose(logits: mx.array, draws: Sequence[Draw], part: Part | None = None) -> mx.array:
    """Token ids int32 [draws] for logits [draws, vocabulary]; -1 where the logits are not finite.

    Not evaluated, but for sampled draws on a CPU, which are made on the host.

    `part`: the logits are those of some tokens alone, and their places in it are returned instead of ids.
    """
    logits = adjusted(logits, [(draw.tally, draw.draft) for draw in draws])
    if all(draw.sampling.is_greedy for draw in draws):
        return (_likeliest if backend.name() == "cpu" else _likeliest_compiled)(logits)
    if backend.name() == "cpu":
        return _chosen_on_host(logits, draws, part)
    return _chosen_at_once(logits, draws, part)


def _likeliest(logits: mx.array) -> mx.array:
    return _checked(mx.argmax(logits, axis=-1), logits)


_likeliest_compiled = mx.compile(_likeliest, shapeless=True)


def _checked(tokens: mx.array, logits: mx.array) -> mx.array:
    is_finite = mx.isfinite(logits.astype(mx.float32).sum(axis=-1))
    return mx.where(is_finite, tokens.astype(mx.int32), -1)


def _chosen_on_host(logits: mx.array, draws: Sequence[Draw], part: Part | None) -> mx.array:
    columns = None if part is None else part.ids
    parameters = [(draw.sampling, draw.position) for draw in draws]
    rows = np.array(logits.astype(mx.float32), copy=False)
    return mx.array(on_host.chosen(rows, parameters, _vocabulary(logits, part), columns), dtype=mx.int32)


def _chosen_at_once(logits: mx.array, draws: Sequence[Draw], part: Part | None) -> mx.array:
    """All rows in one compiled function, padded to few sizes: on a GPU it is the number of kernels that counts."""
    padding = padded_tokens(len(draws)) - len(draws)
    if padding:
        logits = logits[mx.array([*range(len(draws)), *[0] * padding], dtype=mx.int32)]
    padded = [*draws, *[draws[0]] * padding]
    samplings = [draw.sampling for draw in padded]
    is_noisy = mx.array([not sampling.is_greedy for sampling in samplings])[:, None]
    cut = _Cut.of(samplings)
    function = _compiled(_vocabulary(logits, part), *(array is not None for array in cut.arrays()))
    tokens = function(logits, _temperatures(samplings), is_noisy, _keys(padded), part and part.columns, *cut.given())
    return tokens[: len(draws)]


@cache
def _compiled(vocabulary: int, has_top_k: bool, has_top_p: bool, has_min_p: bool) -> Callable[..., mx.array]:
    """The choice for rows of which some use these."""

    def drawn(
        logits: mx.array,
        temperature: mx.array,
        is_noisy: mx.array,
        keys: mx.array,
        columns: mx.array | None,
        *filters: mx.array,
    ) -> mx.array:
        left = iter(filters)
        cut = _Cut(*(next(left) if has else None for has in (has_top_k, has_top_p, has_min_p)))
        scaled = cut.applied(logits.astype(mx.float32) / temperature)
        noise = mx.where(is_noisy, _noise(keys, vocabulary, columns), 0.0)
        return _checked(mx.argmax(scaled + noise, axis=-1), logits)

    compiled: Callable[..., mx.array] = mx.compile(drawn)
    return compiled


def _temperatures(samplings: Sequence[Sampling]) -> mx.array:
    """[rows, 1]; 1 for greedy rows."""
    return mx.array([1.0 if one.is_greedy else one.temperature for one in samplings])[:, None]


def _keys(draws: Sequence[Draw]) -> mx.array:
    """uint32 [draws, 2], one random key for each."""
    return mx.array([noise_key(draw.sampling.seed, draw.position) for draw in draws], dtype=mx.uint32)


def _noise(keys: mx.array, vocabulary: int, columns: mx.array | None) -> mx.array:
    """Gumbel noise float32 [keys, vocabulary], or [keys, columns], a function of each key."""
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel((vocabulary,), key=key))(keys)
    return noise if columns is None else noise[:, columns]


def _vocabulary(logits: mx.array, part: Part | None) -> int:
    return part.vocabulary if part else int(logits.shape[-1])


@dataclass(frozen=True, slots=True)
class _Cut:
    """What top-k, top-p and min-p leave of each row, [rows, 1]; None: no row uses it. A row that uses none is left."""

    top_k: mx.array | None = None
    top_p: mx.array | None = None
    min_p: mx.array | None = None

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "_Cut":
        def column(values: list[float], unused: float) -> mx.array | None:
            return None if all(value == unused for value in values) else mx.array(values)[:, None]

        return cls(
            column([float(one.top_k) for one in samplings], 0.0),
            column([one.top_p for one in samplings], 1.0),
            column([one.min_p for one in samplings], 0.0),
        )

    def arrays(self) -> tuple[mx.array | None, ...]:
        return self.top_k, self.top_p, self.min_p

    def given(self) -> list[mx.array]:
        return [array for array in self.arrays() if array is not None]

    def applied(self, scaled: mx.array) -> mx.array:
        """`scaled` [rows, vocabulary], logits over temperature, with what is cut set to -inf."""
        if not self.given():
            return scaled
        weights = mx.exp(scaled - scaled.max(axis=-1, keepdims=True))  # 1 for the most probable token
        floor = mx.zeros((scaled.shape[0], 1)) if self.min_p is None else self.min_p
        if self.top_k is not None:
            wanted = mx.where(self.top_k > 0, self.top_k, float(scaled.shape[-1]))
            floor = mx.maximum(floor, _threshold(weights, mx.ones_like(weights), wanted))
        if self.top_p is not None:
            inside = mx.where(weights >= floor, weights, 0.0)
            nucleus = _threshold(weights, inside, self.top_p * inside.sum(axis=-1, keepdims=True))
            floor = mx.maximum(floor, mx.where(self.top_p < 1.0, nucleus, 0.0))
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
