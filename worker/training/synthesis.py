"""The model writes conversations: its own user turns and answers, many rows in lockstep (Magpie, arXiv 2406.08464).

Where there are given prompts, half of the rows begin with one each, as long as there are new ones. Some rows begin with
a long user turn around texts that the model wrote before.

Every row begins at position 0 and runs to the same length, turn after turn, so that no row waits for another, nothing
is masked and every token is of use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from worker import backend
from worker.training.dialogue import Dialogue

TEMPLATE, USER, ANSWER = 0, 1, 2  # what wrote a token
_USER, _MIDDLE, _ANSWER, _BETWEEN = 0, 1, 2, 3
_LEAST_TURN, _USER_MIN_P = 3, 0.02
_USER_TEMPERATURES = (0.8, 1.0, 1.1)
_ANSWER_TEMPERATURES, _ANSWER_SHARES = (0.0, 0.7, 1.0), (0.45, 0.40, 0.15)
_USER_LIMITS, _USER_LIMIT_SHARES = (64, 160, 400), (0.3, 0.5, 0.2)  # tokens of a user turn, at most
ANSWER_LIMIT = 400
_GIVEN_SHARE = 0.5  # of a round's rows
LEAST_TEXT = 24  # tokens of an answer that is worth to be told again
_ANSWER_ROOM = 160  # tokens that are left behind a long user turn, or half of a row
_WAIT_EVERY = 16  # steps that are handed to the device before it is waited for


Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """Rows of one round: `tokens` int32 [rows, length], `kinds` uint8 [rows, length] of TEMPLATE, USER, ANSWER."""

    tokens: Array
    kinds: Array


class Writer:
    """Writes rounds of conversations with a model. `prompts` (token ids up to the answer) are answered once each."""

    def __init__(
        self,
        model: nn.Module,
        dialogue: Dialogue,
        rows: int,
        length: int,
        seed: int,
        prompts: Sequence[Sequence[int]] = (),
        long_share: float = 0.0,
    ) -> None:
        self._model = model
        self._dialogue = dialogue
        self._rows = rows
        self._length = length
        self._seed = seed
        self._long_rows = int(rows * long_share)
        self._prompts = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]
        self._prompts_a_round = max(int(rows * _GIVEN_SHARE), 1)
        longest = max(len(dialogue.middle), len(dialogue.between))
        forced = [_padded(dialogue.middle, longest), _padded(dialogue.between, longest)]
        self._forced = mx.array(forced, dtype=mx.int32)  # [2, longest]
        self._lengths = mx.array([len(dialogue.middle), len(dialogue.between)], dtype=mx.int32)
        # A CPU gains nothing from fusing these, and MLX's compiler for it makes some of them into code that crashes.
        self._pick = self._picked if backend.name() == "cpu" else mx.compile(self._picked)

    def write(self, number: int, texts: Sequence[Array] = ()) -> Written:
        """Round `number`, which is a function of it, the seed and earlier `texts` (token ids) to be told again."""
        random = np.random.default_rng([self._seed, number])
        table, begun, phase = self._beginnings(random, number, texts)
        temperatures, limits = self._habits(random)
        keys = mx.random.split(mx.random.key(self._seed * 100_003 + number), self._length)
        first = int(np.array(begun).min())
        cache = make_prompt_cache(self._model)
        tokens, kinds = [table[:, :first]], [mx.zeros((self._rows, first), mx.uint8)]
        logits = self._model(tokens[0], cache=cache)[:, -1]
        count = mx.zeros((self._rows,), mx.int32)
        for position in range(first, self._length):
            given, is_given = table[:, min(position, table.shape[1] - 1)], begun > position
            token, kind, phase, count = self._pick(
                logits, given, is_given, phase, count, temperatures, limits, keys[position]
            )
            tokens.append(token[:, None])
            kinds.append(kind[:, None])
            logits = self._model(token[:, None], cache=cache)[:, -1]
            mx.async_eval(logits, token, kind, phase, count)
            if position % _WAIT_EVERY == 0:
                mx.eval(token)
        return Written(np.array(mx.concatenate(tokens, axis=1)), np.array(mx.concatenate(kinds, axis=1)))

    def _habits(self, random: np.random.Generator) -> tuple[mx.array, mx.array]:
        """Temperatures and longest turns of each row, [2, rows]: of user turns, and of answers."""
        users = random.choice(_USER_TEMPERATURES, self._rows)
        answers = random.choice(_ANSWER_TEMPERATURES, self._rows, p=_ANSWER_SHARES)
        limits = random.choice(_USER_LIMITS, self._rows, p=_USER_LIMIT_SHARES)
        return (
            mx.array(np.stack([users, answers]).astype(np.float32)),
            mx.array(np.stack([limits, np.full(self._rows, ANSWER_LIMIT)]).astype(np.int32)),
        )

    def prompts_begun(self, rounds: int) -> int:
        """Given prompts that so many rounds answer."""
        return min(rounds * self._prompts_a_round, len(self._prompts))

    def _beginnings(
        self, random: np.random.Generator, number: int, texts: Sequence[Array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """What the rows of a round begin with: tokens [rows, longest], how many in each row, and its phase [rows].

        Some begin with a given prompt or a long user turn, half of the others with an opener of one.
        """
        prefix, openers = self._dialogue.prefix, self._dialogue.openers
        own = _USER if self._dialogue.middle else _ANSWER
        chosen = [
            (own, (*prefix, *openers[random.integers(len(openers))]) if openers and random.random() < 0.5 else prefix)
            for _ in range(self._rows)
        ]
        new = self._prompts[self.prompts_begun(number) : self.prompts_begun(number + 1)]
        places = random.permutation(self._rows)
        for place, prompt in zip(places, new, strict=False):
            chosen[place] = _ANSWER, tuple(prompt)
        if texts and self._dialogue.frames:
            for place in places[len(new) :][: self._long_rows]:
                chosen[place] = self._long_turn(random, texts)
        longest = max(len(given) for _, given in chosen)
        rows = mx.array([_padded(given, longest) for _, given in chosen], dtype=mx.int32)
        counts = mx.array([len(given) for _, given in chosen], dtype=mx.int32)
        return rows, counts, mx.array([phase for phase, _ in chosen], dtype=mx.int32)

    def _long_turn(self, random: np.random.Generator, texts: Sequence[Array]) -> tuple[int, tuple[int, ...]]:
        """The phase after it, and the tokens of a user turn around some of the texts."""
        talk = self._dialogue
        frame = talk.frames[int(random.integers(len(talk.frames)))]
        most = self._length - min(_ANSWER_ROOM, self._length // 2)
        left = int(random.integers(most // 4, most + 1))
        told: list[int] = []
        while left > 0:
            text = texts[int(random.integers(len(texts)))][:left].tolist()
            told += [*talk.gap, *text] if told else text
            left -= len(text) + len(talk.gap)
        begun = (*talk.prefix, *frame.before, *told, *frame.behind)
        if frame.goes_on and talk.middle:
            return _USER, begun
        return _ANSWER, (*begun, *talk.middle)

    def _picked(
        self,
        logits: mx.array,
        given: mx.array,
        is_given: mx.array,
        phase: mx.array,
        count: mx.array,
        temperatures: mx.array,
        limits: mx.array,
        key: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """The next token of each row, what wrote it, and the row's phase and tokens in it afterwards, [rows] each."""
        is_user, is_drawn = phase == _USER, (phase == _USER) | (phase == _ANSWER)
        drawn = self._drawn(logits, is_user, temperatures, key)
        has_ended = mx.where(is_user, _is_in(drawn, self._dialogue.specials), _is_in(drawn, self._dialogue.ends))
        has_ended = has_ended | (mx.where(is_user, drawn == self._forced[0, 0], False))
        has_ended = (has_ended & (count >= _LEAST_TURN)) | (count >= mx.where(is_user, limits[0], limits[1]))
        has_ended = has_ended & is_drawn & ~is_given
        # A turn that has ended goes on with the template's text, whose first token takes the place of the drawn one.
        text = mx.where(phase <= _MIDDLE, 0, 1)
        place = mx.where(is_drawn, 0, count)
        template = self._forced[text, place]
        token = mx.where(is_given, given, mx.where(is_drawn & ~has_ended, drawn, template))
        kind = mx.where(is_given, TEMPLATE, mx.where(is_user, USER, mx.where(phase == _ANSWER, ANSWER, TEMPLATE)))
        reached = place + 1
        is_template = ~is_given & (has_ended | ~is_drawn)
        is_through = is_template & (reached >= self._lengths[text])
        after = mx.where(text == 0, _ANSWER, _USER if self._dialogue.middle else _ANSWER)
        during = mx.where(text == 0, _MIDDLE, _BETWEEN)
        phase = mx.where(is_through, after, mx.where(is_template, during, phase))
        count = mx.where(is_through, 0, mx.where(is_template, reached, count + 1))
        count = mx.where(is_given, 0, count)  # what is given is no part of a turn's limit
        return token.astype(mx.int32), kind.astype(mx.uint8), phase.astype(mx.int32), count.astype(mx.int32)

    def _drawn(self, logits: mx.array, is_user: mx.array, temperatures: mx.array, key: mx.array) -> mx.array:
        scores = logits.astype(mx.float32)
        least = mx.max(scores, axis=-1, keepdims=True) + math.log(_USER_MIN_P)
        scores = mx.where(is_user[:, None] & (scores < least), -1e9, scores)
        temperature = mx.where(is_user, temperatures[0], temperatures[1])[:, None]
        return mx.argmax(scores + temperature * mx.random.gumbel(scores.shape, key=key), axis=-1).astype(mx.int32)


def _is_in(tokens: mx.array, chosen: frozenset[int]) -> mx.array:
    if not chosen:
        return mx.zeros(tokens.shape, mx.bool_)
    return (tokens[:, None] == mx.array(sorted(chosen), dtype=mx.int32)).any(axis=-1)


def _padded(tokens: tuple[int, ...], length: int) -> list[int]:
    return [*tokens, *[tokens[-1] if tokens else 0] * (length - len(tokens))]
