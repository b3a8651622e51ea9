"""A target's answers to given prompts, to measure a head on: lockstep batches of prompts of like length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

Array = np.ndarray[Any, Any]
_BATCH_TOKENS = 16384
_WAIT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Answers:
    """Whole rows int32 [rows, length], padded; answers stand at [starts, ends).

    Tokens were drawn as argmax(logits / temperature + noise), see `noise_at`.
    """

    tokens: Array
    starts: Array
    ends: Array
    temperature: float
    seed: int


def answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], temperature: float, most: int, ends: frozenset[int], seed: int
) -> list[Answers]:
    """Answers of `most` tokens at most to prompts (token ids)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups: list[list[int]] = []
    for number in order:
        length = len(prompts[number]) + most
        fits = groups and len(prompts[number]) <= 1.3 * len(prompts[groups[-1][0]]) + 32
        if not fits or (len(groups[-1]) + 1) * length > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(number)
    return [_answer(model, [prompts[i] for i in g], temperature, most, ends, seed + g[0]) for g in groups]


def noise_at(seed: int, position: int, shape: Sequence[int]) -> mx.array:
    """Gumbel noise of a group's draws at one position, [rows, vocabulary]."""
    return mx.random.gumbel(shape, key=mx.random.key(1_000_003 * (seed + 1) + position))


def _answer(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    most: int,
    ends: frozenset[int],
    seed: int,
) -> Answers:
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    first, longest = int(lengths.min()), int(lengths.max())
    table = mx.array(np.stack([np.pad(np.array(p, np.int32), (0, longest - len(p))) for p in prompts]))
    own = mx.array(lengths)
    cache = make_prompt_cache(model)
    for start in range(0, first, 256):
        logits = model(table[:, start : min(start + 256, first)], cache=cache)[:, -1]
        mx.eval(logits)
    tokens = [table[:, :first]]
    for position in range(first, longest + most):
        scores = logits.astype(mx.float32)
        if temperature:
            scores = scores / temperature + noise_at(seed, position, scores.shape)
        token = mx.argmax(scores, axis=-1).astype(mx.int32)
        if position < longest:
            token = mx.where(own > position, table[:, position], token)
        tokens.append(token[:, None])
        logits = model(token[:, None], cache=cache)[:, -1]
        mx.async_eval(token, logits)
        if position % _WAIT_EVERY == 0:
            mx.eval(token)
    rows = np.array(mx.concatenate(tokens, axis=1))
    until = [_end(row, int(start), most, ends) for row, start in zip(rows, lengths, strict=True)]
    return Answers(rows, lengths, np.array(until), temperature, seed)


def _end(row: Array, start: int, most: int, ends: frozenset[int]) -> int:
    for place in range(start, start + most):
        if int(row[place]) in ends:
            return place + 1
    return start + most
