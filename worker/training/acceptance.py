"""How many of a trained drafter's drafts would stand, counted on finished texts.

While all drafts before it were right, what a chain feeds it is the text itself: so one unrolled run over a text
tells, for every position and depth, whether the draft there would be right.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from worker.heads.folder import Trained
from worker.training.answers import Answers, noise_at
from worker.training.passes import outputs
from worker.training.reading import Reader

Array = np.ndarray[Any, Any]
_COLUMNS = 32  # positions whose logits exist at a time
LEAST_COPIED_MATCH = 3


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
    width = 1 if answers.temperature else _COLUMNS
    rows = trained.rows
    size = reader.vocabulary
    for start in range(first, last, width):
        end = min(start + width, last)
        noise = None
        if answers.temperature:
            noise = noise_at(answers.seed, start + 2, (len(tokens), size))[:, None, vocabulary]
        for number, output in enumerate(states):
            if number and output is states[number - 1]:
                right[number, :, start:end] = right[number - 1, :, start:end]
                continue
            scores = rows(output[:, start:end]).astype(mx.float32)
            if noise is not None:
                scores = scores / answers.temperature + noise
            guess = vocabulary[mx.argmax(scores, axis=-1)]
            right[number, :, start:end] = np.array(guess == tokens[:, start + 2 : end + 2])
    return right


def walk(right: Array, row: Sequence[int], start: int, end: int, length: int, *, copies: bool = False) -> list[int]:
    """Draft tokens that stand in each step over an answer row[start:end].

    `right` [passes, positions] of the row. With `copies` a step drafts what followed the longest match of three tokens
    or more, where there is one, and with the trained drafter otherwise.
    """
    accepted: list[int] = []
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    seen = 0
    at = start - 1
    while at + 2 < end:
        most = min(length, end - (at + 2))
        copied: Sequence[int] = ()
        if copies:
            known = at + 2
            for place in range(max(seen, LEAST_COPIED_MATCH), known):
                places[tuple(row[place - LEAST_COPIED_MATCH : place])].append(place)
            seen = known
            copied = _copied(row, known, places, most)
        stood = 0
        if copied:
            while stood < len(copied) and copied[stood] == row[at + 2 + stood]:
                stood += 1
        else:
            while stood < most and right[stood][at + stood]:
                stood += 1
        if most == length:
            accepted.append(stood)
        at += stood + 1
    return accepted


def count(trained: Trained, reader: Reader, groups: Iterable[Answers], length: int, *, copies: bool = False) -> Counts:
    """Steps over all answers."""
    counts = Counts(length)
    each_step(
        trained,
        reader,
        groups,
        length,
        lambda _, plain, combined: counts.accepted.extend(combined if copies else plain),
    )
    return counts


def each_step(
    trained: Trained,
    reader: Reader,
    groups: Iterable[Answers],
    length: int,
    take: Callable[[int, list[int], list[int]], None],
) -> None:
    """Hands each prompt's number to `take`, with its steps by the drafter alone and by copies and it together."""
    for group in groups:
        right = right_drafts(trained, reader, group, length)
        for i, number in enumerate(group.numbers):
            span = int(group.starts[i]), int(group.ends[i])
            row = [int(token) for token in group.tokens[i]]
            plain = walk(right[:, i], row, *span, length)
            take(number, plain, walk(right[:, i], row, *span, length, copies=True))


def _copied(row: Sequence[int], known: int, places: dict[tuple[int, ...], list[int]], most: int) -> Sequence[int]:
    """What followed the longest match of the row's known end, the latest of equals."""
    best, longest = 0, 0
    for place in places.get(tuple(row[known - LEAST_COPIED_MATCH : known]), [])[-16:]:
        match = LEAST_COPIED_MATCH
        while match < 64 and place > match and row[place - match - 1] == row[known - match - 1]:
            match += 1
        if match >= longest:
            best, longest = place, match
    return row[best : min(best + most, known)] if best else ()
