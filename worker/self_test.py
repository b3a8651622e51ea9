"""At load: does the ragged cache give this model's own logits, with and without rollbacks? A model whose files we
do not know may use its cache in a way that packed steps or a replay break, and must not answer wrongly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from common.errors import ConfigError
from worker.cache.layout import Segment
from worker.target import Target

PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (9, 8, 7), (5, 5, 6, 1, 2))
TOLERANCE = 0.05  # of the logits' own spread; a wrong position or mask is off by far more
NOISE_FACTOR = 3.0  # and so many times what a model in 16 bits is off from itself, read in another way …
MOST_NOISE = 0.1  # … but never more than this
ROUNDED_TOLERANCE = {8: 0.5, 4: float("inf")}  # by kv_bits; 4 bits may be too few for a model, by any measure

_WRONG_DRAFT = 11  # fed after what is kept, so that a state which was not rolled back remembers another token
_BROKEN = (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError)  # of foreign model files


class WrongLogits(ConfigError):
    """The model's logits through the ragged cache are not its own."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model makes of the test prompts by itself: last logits [vocabulary] of each, and how sure they are.

    `noise`: how far they are off, as a part of their spread, when the same model reads token by token.
    """

    logits: list[mx.array]
    noise: float = 0.0


def reference_logits(model: nn.Module) -> Reference:
    """From mlx-lm's own cache; before a `Target` is made of the model."""
    logits = [model(mx.array([prompt]), cache=make_prompt_cache(model))[0, -1] for prompt in PROMPTS]
    mx.eval(logits)
    if logits[0].dtype == mx.float32:
        return Reference(logits)
    one_by_one = [_read_one_by_one(model, prompt) for prompt in PROMPTS]
    return Reference(logits, max(_error(got, wanted) for got, wanted in zip(one_by_one, logits, strict=True)))


def _read_one_by_one(model: nn.Module, prompt: Sequence[int]) -> mx.array:
    cache = make_prompt_cache(model)
    for token in prompt:
        logits: mx.array = model(mx.array([[token]]), cache=cache)[0, -1]
        mx.eval(logits)
    return logits


def check(target: Target, reference: Reference, tolerance: float = TOLERANCE) -> str:
    """Feed the same prompts together in uneven pieces, plainly and with rollbacks.

    Returns why the model cannot speculate, "" if it can. Raises `WrongLogits` if it cannot even decode plainly.
    """
    if fault := _fault(target, reference, tolerance, _fed_plainly):
        raise WrongLogits(f"{fault}: this model's architecture does not work with the ragged cache yet")
    if fault := _fault(target, reference, tolerance, _fed_with_rollbacks):
        return f"{fault} when draft tokens were rolled back"
    return ""


def rounding_error(target: Target, reference: Reference) -> float:
    """How far the logits are off when nothing is rolled back, as a part of their spread."""
    logits = _fed_plainly(target)
    target.clear()
    return max(_error(got, wanted) for got, wanted in zip(logits, reference.logits, strict=True))


def _fault(target: Target, reference: Reference, tolerance: float, feed: Callable[[Target], list[mx.array]]) -> str:
    """What is wrong with the logits that a way of feeding gives, "" if nothing."""
    try:
        logits = feed(target)
    except _BROKEN as failure:
        return f"its own code failed in a packed step ({type(failure).__name__}: {failure})"
    finally:
        target.clear()
    limit = tolerance + NOISE_FACTOR * min(reference.noise, MOST_NOISE)
    for prompt, got, wanted in zip(PROMPTS, logits, reference.logits, strict=True):
        error = _error(got, wanted)
        if not error < limit:
            return (
                f"after a prompt of {len(prompt)} tokens the batched logits are off by {error:.1%} of their spread "
                f"(limit {limit:.0%})"
            )
    return ""


def _error(got: mx.array, wanted: mx.array) -> float:
    spread = float(mx.maximum(wanted.max() - wanted.min(), 1e-6))
    return float(mx.abs(got - wanted).max()) / spread


def _fed_plainly(target: Target) -> list[mx.array]:
    """Prompts in chunks, then their last tokens one at a time."""
    _feed(target, [Segment(0, 0, 4, True), Segment(1, 0, 1, True), Segment(2, 0, 4, True)])
    _feed(target, [Segment(0, 4, 2, True), Segment(1, 1, 1, True)])
    return _feed(target, [Segment(0, 6, 1, True), Segment(1, 2, 1, True), Segment(2, 4, 1, True)])


def _fed_with_rollbacks(target: Target) -> list[mx.array]:
    """As drafts: more tokens than are kept, of which the last ones are wrong."""
    _feed(target, [Segment(0, 0, 3), Segment(1, 0, 1), Segment(2, 0, 4)], keep=[2, 1, 1])
    _feed(target, [Segment(0, 2, 4), Segment(2, 1, 4)], keep=[3, 2])
    _feed(target, [Segment(1, 1, 2), Segment(2, 3, 2)], keep=[0, 0])
    return _feed(target, [Segment(0, 5, 2), Segment(1, 1, 2), Segment(2, 3, 2)])


def _feed(target: Target, segments: Sequence[Segment], keep: Sequence[int] | None = None) -> list[mx.array]:
    """Feed each segment's part of its prompt, of which `keep` tokens stand; returns the last logits of each."""
    kept = [segment.width for segment in segments] if keep is None else keep
    tokens = [token for segment, n in zip(segments, kept, strict=True) for token in _tokens(segment, n)]
    ends = [sum(s.width for s in segments[: row + 1]) - 1 for row in range(len(segments))]
    logits = target.forward(segments, tokens, ends)
    mx.eval(logits, target.cached_arrays())
    for segment, n in zip(segments, kept, strict=True):
        target.state.commit(segment.slot, segment.start + n)
    return [logits[row] for row in range(len(segments))]


def _tokens(segment: Segment, kept: int) -> list[int]:
    right = PROMPTS[segment.slot][segment.start : segment.start + kept]
    return [*right, *[_WRONG_DRAFT] * (segment.width - kept)]
