"""How many of a trained drafter's drafts would stand, counted on finished texts.

While all drafts before it were right, what a chain feeds it is the text itself: so one unrolled run over a text
tells, for every position and depth, whether the draft there would be right.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from worker.drafters.suffix import NO_COPY, SuffixDrafter
from worker.drafting import SURE_MATCH
from worker.heads.folder import Trained
from worker.training.answers import Answers, noise_at
from worker.training.passes import outputs
from worker.training.reading import Reader

Array = np.ndarray[Any, Any]
_COLUMNS = 32  # positions whose logits exist at a time


@dataclass(slots=True)
class Counts:
    """Draft tokens that stood, by verification step."""

    length: int  # of a draft
    accepted: list[int] = field(default_factory=list)

    @property
    def accept_length(self) -> float:
        """Mean tokens of a step, the target's own one included; 1 where nothing was counted."""
        return 1.0 + (sum(self.accepted) / len(self.accepted) if self.accepted else 0.0)

    @property
    def by_position(self) -> list[float]:
        """Chance of each position to stand, given that all before it stood."""
        reached = [sum(a >= depth for a in self.accepted) for depth in range(self.length + 1)]
        return [round(after / before, 4) if before else 0.0 for before, after in pairwise(reached)]


def right_drafts(trained: Trained, reader: Reader, answers: Answers, passes: int) -> Array:
    """bool [passes, rows, length]: whether pass j at position t gives the token at t + 2."""
    tokens = mx.array(answers.tokens)
    vocabulary = trained.vocabulary
    read = reader.read(tokens)
    states = outputs(trained, read, passes)
    mx.eval(states)
    right = np.zeros((passes, *answers.tokens.shape), dtype=bool)
    last = answers.tokens.shape[1] - 2
    first = max(int(answers.starts.min()) - 1, 0)
    size = reader.vocabulary
    for start in range(first, last, _COLUMNS):
        end = min(start + _COLUMNS, last)
        noise = None
        if answers.temperature:
            drawn = [noise_at(answers.seed, at + 2, (len(tokens), size))[:, vocabulary] for at in range(start, end)]
            noise = mx.stack(drawn, axis=1)
        guesses: list[mx.array] = []
        for number, output in enumerate(states):
            if number and output is states[number - 1]:
                guesses.append(guesses[-1])
                continue
            scores = trained.rows(output[:, start:end]).astype(mx.float32)
            if noise is not None:
                scores = scores / answers.temperature + noise
            guesses.append(vocabulary[mx.argmax(scores, axis=-1)])
            mx.async_eval(guesses[-1])
        right[:, :, start:end] = np.array(mx.stack(guesses) == tokens[:, start + 2 : end + 2])
    return right


def walk(right: Array, row: Sequence[int], start: int, end: int, length: int, *, copied: int = 0) -> list[int]:
    """Draft tokens that stand in each step over an answer row[start:end].

    `right` [passes, positions] of the row; a draft has `length` tokens. With `copied` a step drafts what `suffix` is as
    sure of as `combo` wants it, so many tokens at most, and with the trained drafter otherwise.
    """
    accepted: list[int] = []
    copies = SuffixDrafter()
    known = list(row[: start + 1])
    most = max(length, copied)
    while len(known) < end:
        left = end - len(known)
        copy = copies.propose("", "", known, copied) if copied else NO_COPY
        stood = 0
        if copy.tokens and copy.match >= SURE_MATCH:
            while stood < min(len(copy.tokens), left) and copy.tokens[stood] == row[len(known) + stood]:
                stood += 1
        else:
            while stood < min(length, left) and right[stood][len(known) - 2 + stood]:
                stood += 1
        if left >= most:
            accepted.append(stood)
        known += row[len(known) : len(known) + stood + 1]
    return accepted


def count(
    trained: Trained, reader: Reader, groups: Iterable[Answers], length: int, copied: Sequence[int] = (0,)
) -> list[Counts]:
    """Steps over all answers, for each of `copied` (see `walk`)."""
    counts = [Counts(length) for _ in copied]
    for group in groups:
        right = right_drafts(trained, reader, group, length)
        for i, tokens in enumerate(group.tokens.tolist()):
            span = int(group.starts[i]), int(group.ends[i])
            for own, most in zip(counts, copied, strict=True):
                own.accepted += walk(right[:, i], tokens, *span, length, copied=most)
    return counts
