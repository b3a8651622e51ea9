"""What a row's logit biases and penalties do to its logits: kept up to date token by token, applied at few entries.

Penalties as in CTRL (arXiv 1909.05858; `repetition_penalty`) and in OpenAI's API (`presence_penalty` and
`frequency_penalty`). A draft's tokens are counted as if they were committed, for the draws after them: a draw's logits
are those of plain decoding at its position.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from common.sampling import Sampling


@dataclass(slots=True)
class Tally:
    """The entries of one row's logits that change: a column for each token id that has a bias or was counted.

    An entry becomes `penalized(logit + bias) - minus`, where `penalized` divides what is positive by `factor` and
    multiplies the rest with it. Its cost in a step is that of the distinct tokens, not of the context.
    """

    sampling: Sampling
    prompt_tokens: int
    counted: int = 0
    largest_id: int = -1
    columns: dict[int, int] = field(default_factory=dict)
    ids: "array[int]" = field(default_factory=lambda: array("i"))
    bias: "array[float]" = field(default_factory=lambda: array("f"))
    factor: "array[float]" = field(default_factory=lambda: array("f"))
    minus: "array[float]" = field(default_factory=lambda: array("f"))
    seen: "array[int]" = field(default_factory=lambda: array("i"))  # occurrences in prompt and output
    made: "array[int]" = field(default_factory=lambda: array("i"))  # occurrences in the output

    @classmethod
    def of(cls, sampling: Sampling, prompt_tokens: int) -> "Tally | None":
        """None for a request whose logits are taken as they are."""
        if not sampling.changes_logits:
            return None
        tally = cls(sampling, prompt_tokens)
        for token, bias in sampling.logit_bias:
            tally.bias[tally._column(token)] += bias
        return tally

    def extend(self, tokens: Sequence[int]) -> None:
        """Count what `tokens`, a row's prompt and output, has more than at the last call."""
        sampling = self.sampling
        if sampling.counts_tokens:
            first = self.counted if sampling.repetition_penalty != 1.0 else max(self.counted, self.prompt_tokens)
            for position in range(first, len(tokens)):
                self._count(tokens[position], 1, is_output=position >= self.prompt_tokens)
        self.counted = len(tokens)

    def add_draft(self, draft: Sequence[int]) -> None:
        """Count draft tokens as output, until `remove_draft`."""
        if self.sampling.counts_tokens:
            for token in draft:
                self._count(token, 1, is_output=True)

    def remove_draft(self, draft: Sequence[int]) -> None:
        """Undo `add_draft`. A column that stays behind changes nothing."""
        if self.sampling.counts_tokens:
            for token in draft:
                self._count(token, -1, is_output=True)

    def _count(self, token: int, times: int, *, is_output: bool) -> None:
        column = self._column(token)
        self.seen[column] += times
        self.made[column] += times if is_output else 0
        sampling, made = self.sampling, self.made[column]
        self.factor[column] = sampling.repetition_penalty if self.seen[column] else 1.0
        self.minus[column] = sampling.frequency_penalty * made + (sampling.presence_penalty if made else 0.0)

    def _column(self, token: int) -> int:
        column = self.columns.get(token)
        if column is None:
            assert token >= 0
            self.largest_id = max(self.largest_id, token)
            column = self.columns[token] = len(self.ids)
            self.ids.append(token)
            for values, start in ((self.bias, 0.0), (self.factor, 1.0), (self.minus, 0.0)):
                values.append(start)
            for counts in (self.seen, self.made):
                counts.append(0)
        return column


def adjusted(logits: mx.array, tallies: Sequence[tuple[Tally | None, Sequence[int]]]) -> mx.array:
    """`logits` [draws, vocabulary] after biases and penalties, in float32 if any draw has them; not evaluated.

    For each draw there is its row's tally, and the draft tokens between the row's own ones and the draw.
    """
    draws, ids = array("i"), array("i")
    bias, factor, minus = array("f"), array("f"), array("f")
    for draw, (tally, draft) in enumerate(tallies):
        if tally is None:
            continue
        tally.add_draft(draft)
        assert tally.largest_id < logits.shape[-1]  # scatters check no bounds
        draws += array("i", [draw]) * len(tally.ids)
        ids += tally.ids
        bias += tally.bias
        factor += tally.factor
        minus += tally.minus
        tally.remove_draft(draft)
    if not ids:
        return logits
    return _changed(logits, *(mx.array(cast(Any, values)) for values in (draws, ids, bias, factor, minus)))


def _changed(
    logits: mx.array, draws: mx.array, ids: mx.array, bias: mx.array, factor: mx.array, minus: mx.array
) -> mx.array:
    """The entries (draws, ids) changed, each of which occurs once; all five are [entries]."""
    changed = logits.astype(mx.float32)
    entries = changed[draws, ids] + bias
    entries = mx.where(entries > 0, entries / factor, entries * factor) - minus
    changed = mx.array(changed)
    changed[draws, ids] = entries
    return changed
