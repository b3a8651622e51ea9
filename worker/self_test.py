"""At load: does the ragged cache give this model's own logits? A model whose files we do not know may use its cache in
a way that packed steps break, and must not answer wrongly."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from common.errors import ConfigError
from worker.cache.layout import Segment
from worker.target import Target

PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (9, 8, 7), (5, 5, 6, 1, 2))
TOLERANCE = 0.05  # of the logits' own spread; a wrong position or mask is off by far more
ROUNDED_TOLERANCE = {8: 0.5, 4: float("inf")}  # by kv_bits; 4 bits may be too few for a model, by any measure


class WrongLogits(ConfigError):
    """The model's logits through the ragged cache are not its own."""


def reference_logits(model: nn.Module) -> list[mx.array]:
    """Last logits [vocabulary] of each test prompt from mlx-lm's own cache; before a `Target` is made of the model."""
    logits = [model(mx.array([prompt]), cache=make_prompt_cache(model))[0, -1] for prompt in PROMPTS]
    mx.eval(logits)
    return logits


def check(target: Target, reference: list[mx.array], tolerance: float = TOLERANCE) -> float:
    """Feed the same prompts together, in uneven pieces with a rollback between.

    Returns how far the logits are off, as a part of their spread. Raises `WrongLogits` where that is too far.
    """
    errors = []
    _feed(target, [(0, 3), (0, 1), (0, 4)], keep=[2, 1, 1])
    logits = _feed(target, [(2, 7), (1, 3), (1, 5)], keep=[7, 3, 5])
    target.clear()
    for prompt, got, wanted in zip(PROMPTS, logits, reference, strict=True):
        spread = float(mx.maximum(wanted.max() - wanted.min(), 1e-6))
        error = float(mx.abs(got - wanted).max()) / spread
        errors.append(error)
        if not error < tolerance:
            raise WrongLogits(
                f"after a prompt of {len(prompt)} tokens the batched logits are off by {error:.1%} of their spread "
                f"(limit {tolerance:.0%}): this model's architecture does not work with the ragged cache yet"
            )
    return max(errors)


def _feed(target: Target, spans: list[tuple[int, int]], keep: list[int]) -> list[mx.array]:
    """Feed tokens [start, end) of each prompt; returns the last logits of each and keeps the given lengths."""
    segments = [Segment(row, start, end - start) for row, (start, end) in enumerate(spans)]
    tokens = [token for row, (start, end) in enumerate(spans) for token in PROMPTS[row][start:end]]
    ends = [sum(s.width for s in segments[: row + 1]) - 1 for row in range(len(segments))]
    logits = target.forward(segments, tokens, ends)
    mx.eval(logits, target.cached_arrays())
    for row, length in enumerate(keep):
        target.state.commit(row, length)
    return [logits[row] for row in range(len(segments))]
