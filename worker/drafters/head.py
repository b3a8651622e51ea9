"""The `head` drafter: a trained head on the target's hidden states (see `heads/head.py`) with a small cache of its own.

Its cache is one more layer of the target's: the same slots and positions, kept, moved, shared as prefixes and freed
with them. Position p needs what the target made of token p and the token after it, so it is read one token behind,
from what the verification forward put out anyway. Reading is put off until a draft is wanted or there is enough to read
at once: a row that is parked costs next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from worker import cpu_ops, matrices
from worker.cache import rotary
from worker.cache.attention import install
from worker.cache.layout import Segment
from worker.cache.ragged import RaggedKVCache, Step, Visibility
from worker.compiled import CompiledStep
from worker.drafters.chain import ChainDrafter, match_of
from worker.drafters.drafter import Ask, Offer
from worker.heads.head import Head
from worker.request import Row
from worker.sampling.sampler import Draw, Part, choose
from worker.step_times import StepTimes
from worker.target import Target

READ_TOKENS = 64  # read at the latest when so many wait in a row, together with the other rows' …
LEAST_READ_TOKENS = 16  # … where so many wait …
USUAL_READ_TOKENS = 4  # of each row, where the last step drafted
MOST_READ_TOKENS = 512  # … and at most so many at once


@dataclass(slots=True)
class Piece:
    """What a forward put out for tokens [start, end) of one row, from place `first` of its packed tokens on."""

    start: int
    end: int
    first: int
    outputs: Sequence[mx.array]  # of each tapped layer, [tokens of the step, 1, hidden]


@dataclass(slots=True)
class Reading:
    """How far a slot has been read, and what waits behind that."""

    read: int
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """The target went on from `piece.start`; what was known from there on did not stand."""
        self.pieces = [p for p in self.pieces if p.start < piece.start]
        if self.pieces:
            self.pieces[-1].end = min(self.pieces[-1].end, piece.start)
        self.read = min(self.read, piece.start)
        self.pieces.append(piece)

    def take(self, end: int) -> list[Piece]:
        """What waits before `end`, which counts as read from now on; the last token at least, read or not."""
        start = min(self.read, end - 1)
        taken = [
            Piece(max(p.start, start), min(p.end, end), p.first + max(start - p.start, 0), p.outputs)
            for p in self.pieces
            if p.start < end and p.end > start
        ]
        self.pieces = [p for p in self.pieces if p.end >= end]  # the last token may be wanted again
        self.read = max(self.read, end)
        return taken


class HeadDrafter(ChainDrafter):
    """Drafts with a head that is bound to the target's model."""

    name = "head"

    def __init__(self, target: Target, head: Head, times: StepTimes, vocabulary: int) -> None:
        super().__init__(target, times)
        self.head = head
        self.vocabulary = vocabulary
        config = head.config
        dtype = head.norm.weight.dtype
        form = (config.kv_heads, config.head_dim, dtype)
        self.caches = [RaggedKVCache(target.state, forms=(form, form)) for _ in head.layers]
        self._readings: dict[int, Reading] = {}  # by slot
        self._feed = CompiledStep(self._feed_body, self.caches, target.state, target.tell_compile)
        self._step = CompiledStep(self._step_body, self.caches, target.state, target.tell_compile)
        self._logits = mx.compile(self._logits_body)
        self._slots: list[int] = []  # of the chain in the making …
        self._hidden = mx.zeros((0, 1, config.hidden_size), dtype)  # … and the head's latest output for each
        install(head)
        cpu_ops.install(head)
        matrices.install(head)
        if target.state.is_fused:
            rotary.postpone(head, target.state)
        target.follow(self, config.taps, self.caches)

    # --- what the target did ------------------------------------------------------------------------------

    def saw(self, segments: Sequence[Segment], outputs: Sequence[mx.array]) -> None:
        """The target was fed with these; `outputs` of the tapped layers, [tokens, 1, hidden] each."""
        first = 0
        for segment in segments:
            reading = self._readings.setdefault(segment.slot, Reading(segment.start))
            reading.add(Piece(segment.start, segment.end, first, outputs))
            first += segment.width

    def cleared(self) -> None:
        """All slots are empty."""
        self._readings = {}

    def keep_up(self, rows: Sequence[Row]) -> None:
        """Read what waits, if it is enough to be worth it: where one row has enough, others join it with less."""
        waiting = {row.slot: self._waiting(row) for row in rows}
        if max(waiting.values(), default=0) >= READ_TOKENS:
            self.catch_up([row for row in rows if waiting[row.slot] >= LEAST_READ_TOKENS])

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Read all that can be read of rows, sorted by slot: up to the token before the last one of each."""
        while behind := [row for row in rows if self._waiting(row) > 0]:
            room, read, ends = MOST_READ_TOKENS, [], []
            for row in behind:
                tokens = min(self._waiting(row), room)
                if tokens:
                    read.append(row)
                    ends.append(self._readings[row.slot].read + tokens)
                    room -= tokens
            self._read(read, ends)

    def rearrange(self, kept: Sequence[int]) -> None:
        self._readings = {i: self._readings[slot] for i, slot in enumerate(kept) if slot in self._readings}

    def forget(self, row: Row, *, is_finished: bool) -> None:
        self._readings.pop(row.slot, None)

    # --- drafting -----------------------------------------------------------------------------------------

    def offer(self, row: Row, limit: int) -> Offer | None:
        reading = self._readings.get(row.slot)
        return Offer(self.name, limit, match_of(row)) if reading is not None and reading.pieces else None

    def catches_up(self, rows: Sequence[Row]) -> bool:
        return sum(self._waiting(row) for row in rows) > USUAL_READ_TOKENS * len(rows)

    def _first(self, asks: Sequence[Ask]) -> mx.array:
        rows = [ask.row for ask in asks]
        if self.catches_up(rows):
            self.catch_up(rows)  # of these only keys and values are computed, since nobody asks for more
        self._slots = [row.slot for row in rows]
        self._hidden, logits = self._read(rows, [row.cached for row in rows])
        return self._picked(asks, logits, 0)

    def _next(self, asks: Sequence[Ask], tokens: mx.array, position: int) -> mx.array:
        slots = [ask.row.slot for ask in asks]
        if slots != self._slots:
            self._hidden = self._hidden[mx.array([self._slots.index(slot) for slot in slots], dtype=mx.int32)]
            self._slots = slots
        segments = [Segment(ask.row.slot, ask.row.cached + position - 1, 1) for ask in asks]
        self._hidden, logits = self._stepped(segments, self._hidden, tokens)
        return self._picked(asks, logits, position)

    def _picked(self, asks: Sequence[Ask], logits: mx.array, position: int) -> mx.array:
        """The likeliest tokens, int32 [rows], or those that the rows' own noise chooses."""
        draws = [Draw(ask.row.request.sampling, len(ask.row.tokens) + position) for ask in asks]
        places = mx.maximum(choose(logits, draws, Part(self.head.vocabulary, self.vocabulary)), 0)
        return self.head.vocabulary[places].astype(mx.int32)  # what is not finite is drafted as any token

    # --- trials -------------------------------------------------------------------------------------------

    def guesses(self, tokens: Sequence[int]) -> mx.array:
        """For a text that the target has just read in slot 0: the likeliest token two places on from each but the last.

        int32 [tokens - 1], not evaluated.
        """
        end = len(tokens) - 1
        pieces = self._readings[0].take(end)
        _, logits = self._fed([Segment(0, 0, end, stands=True)], pieces, list(tokens[1:]), range(end))
        return self.head.vocabulary[mx.argmax(logits, axis=-1)]

    def chain(self, rows: Sequence[Row], length: int) -> list[mx.array]:
        """Tokens of a chain for rows with nothing in their slots, and what it leaves there, not evaluated."""
        asks = [Ask(row, Offer(self.name, length, match_of(row)), length) for row in rows]
        self._slots = [row.slot for row in rows]
        self._hidden, tokens = (
            mx.zeros((len(rows), *self._hidden.shape[1:]), self._hidden.dtype),
            mx.ones(len(rows), mx.int32),
        )
        for position in range(1, length + 1):
            tokens = self._next(asks, tokens, position)
        return [tokens, *(array for cache in self.caches for array in cache.arrays())]

    # --- the head's own forwards --------------------------------------------------------------------------

    def _waiting(self, row: Row) -> int:
        """Tokens of a row that can be read and were not: each needs the token after it."""
        reading = self._readings.get(row.slot)
        return 0 if reading is None else min(row.cached, len(row.tokens) - 1) - reading.read

    def _read(self, rows: Sequence[Row], ends: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Read rows, sorted by slot, up to `ends`; the head's output and logits at the last token of each."""
        segments: list[Segment] = []
        following: list[int] = []
        lasts: list[int] = []
        pieces: list[Piece] = []
        for row, end in zip(rows, ends, strict=True):
            taken = self._readings[row.slot].take(end)
            start = taken[0].start
            segments.append(Segment(row.slot, start, end - start, stands=True))
            following += row.tokens[start + 1 : end + 1]
            lasts.append(len(following) - 1)
            pieces += taken
        return self._fed(segments, pieces, following, lasts)

    def _fed(
        self, segments: Sequence[Segment], pieces: Sequence[Piece], following: list[int], chosen: Sequence[int]
    ) -> tuple[mx.array, mx.array]:
        """Read these tokens: output [chosen, 1, hidden] and logits [chosen, tokens that the head can predict].

        `pieces` are the target's outputs for the tokens of the segments, `following` the tokens after each of them.
        """
        with self.target.state.aside(segments) as step:
            taps = _gathered(pieces, step)
            assert len(following) == step.tokens, (len(following), segments)
            tokens = mx.array(following + following[-1:] * step.padding, dtype=mx.int32)
            feed = self._feed if step.is_by_token else self._feed_body
            (hidden,) = feed(tokens, *taps)
            padding = self.target.state.sizes.padded(len(chosen)) - len(chosen)
            places = mx.array([*chosen, *[chosen[-1]] * padding], dtype=mx.int32)
            return self._scored(hidden[places], len(chosen), step)

    def _stepped(self, segments: Sequence[Segment], hidden: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """One position further for each row: `hidden` [rows, 1, hidden] stands for the features of its token."""
        with self.target.state.aside(segments) as step:
            if step.padding:
                index = mx.array([*range(step.tokens), *[step.tokens - 1] * step.padding], dtype=mx.int32)
                hidden, tokens = hidden[index], tokens[index]
            (hidden,) = (self._step if step.is_by_token else self._step_body)(hidden, tokens)
            return self._scored(hidden, len(segments), step)

    def _scored(self, hidden: mx.array, count: int, step: Step) -> tuple[mx.array, mx.array]:
        """The first `count` of what the head put out, and their logits.

        Compiled by itself: there are fewer shapes than pairs of what is read and what is chosen of it.
        """
        logits = (self._logits if step.is_by_token else self._logits_body)(hidden)
        return hidden[:count], logits[:count]

    def _feed_body(self, tokens: mx.array, *taps: mx.array) -> list[mx.array]:
        return [self._run(self.head.fuse(taps), tokens)]

    def _step_body(self, hidden: mx.array, tokens: mx.array) -> list[mx.array]:
        return [self._run(hidden, tokens)]

    def _logits_body(self, hidden: mx.array) -> mx.array:
        return self.head.logits(hidden)[:, 0]

    def _run(self, features: mx.array, tokens: mx.array) -> mx.array:
        return self.head(features, self.head.embed(tokens)[:, None], self.caches, Visibility(None))


def _gathered(pieces: Sequence[Piece], step: Step) -> list[mx.array]:
    """The tapped layers' outputs for all tokens of a step, [tokens + padding, 1, hidden] each.

    What one forward put out is gathered at once, for all rows, and then brought into the order of the step: rows that
    were fed together in many steps have many pieces, and an operation for each of them would take longer than reading.
    """
    sources: dict[int, tuple[Sequence[mx.array], list[int], list[int]]] = {}  # with places there, and in the step
    end = 0
    for piece in pieces:
        _, taken, places = sources.setdefault(id(piece.outputs), (piece.outputs, [], []))
        count = piece.end - piece.start
        taken += range(piece.first, piece.first + count)
        places += range(end, end + count)
        end += count
    order = np.argsort(np.concatenate([places for _, _, places in sources.values()])).tolist()
    order += order[-1:] * step.padding
    if len(sources) == 1:
        ((outputs, taken, _),) = sources.values()
        index = mx.array([taken[place] for place in order], dtype=mx.int32)
        return [layer[index] for layer in outputs]
    parts = [(outputs, mx.array(taken, dtype=mx.int32)) for outputs, taken, _ in sources.values()]
    ordered = mx.array(order, dtype=mx.int32)
    count = len(pieces[0].outputs)
    return [mx.concatenate([outputs[i][index] for outputs, index in parts])[ordered] for i in range(count)]
