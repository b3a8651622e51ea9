"""The `model` drafter: a separate, smaller model with the same vocabulary, with a ragged cache of its own."""

from collections.abc import Sequence

import mlx.core as mx

from worker.cache.layout import Segment
from worker.drafters.chain import ChainDrafter, match_of
from worker.drafters.drafter import Offer
from worker.request import Row
from worker.step_times import StepTimes
from worker.target import Target

_NEVER = -1e4  # logit of a token that the draft model does not have
CATCH_UP_TOKENS = 256  # of a prompt, fed at once to a draft model that has not read it yet


class ModelDrafter(ChainDrafter):
    """Speculative decoding with a draft model (Leviathan et al., arXiv 2211.17192)."""

    name = "model"

    def __init__(self, target: Target, times: StepTimes, vocabulary: int) -> None:
        super().__init__(target, times)
        self.vocabulary = vocabulary  # of the model it drafts for, whose noise its draws must share

    def forward(self, segments: Sequence[Segment], tokens: mx.array, chosen: Sequence[int]) -> mx.array:
        """Logits over the other model's vocabulary: the two may pad the same one to different sizes."""
        logits = super().forward(segments, tokens, chosen)
        missing = self.vocabulary - logits.shape[-1]
        if missing > 0:
            return mx.pad(logits, [(0, 0), (0, missing)], constant_values=_NEVER)
        return logits[:, : self.vocabulary]

    def offer(self, row: Row, limit: int) -> Offer | None:
        """Nothing yet while the draft model reads the row's prompt, a chunk a step."""
        start = self.cached(row)
        if len(row.tokens) - start > CATCH_UP_TOKENS:
            self._read(row, start)
            return None
        return Offer(self.name, limit, match_of(row))

    def settle(self, row: Row, length: int, accepted: int) -> None:
        """Keeps what it has of the row's tokens: not the draft's last one, never fed, nor the rejected ones."""
        before = len(row.tokens) - accepted - 1
        self.target.state.commit(row.slot, min(before + min(accepted, length - 1), len(row.tokens) - 1))

    def rearrange(self, kept: Sequence[int]) -> None:
        self.target.rearrange(kept)

    def forget(self, row: Row, *, is_finished: bool) -> None:
        if row.slot < self.target.state.slots:
            self.target.state.free(row.slot)
        if not any(self.target.state.lengths):
            self.target.clear()

    def _begin(self, rows: Sequence[Row]) -> None:
        self.target.state.longest_tokens = max(row.request.total_tokens for row in rows)

    def _read(self, row: Row, start: int) -> None:
        tokens = mx.array(row.tokens[start : start + CATCH_UP_TOKENS], dtype=mx.int32)
        self._begin([row])
        self.forward([Segment(row.slot, start, CATCH_UP_TOKENS)], tokens, [0])
        mx.eval(self.target.cached_arrays())
        self.target.state.commit(row.slot, start + CATCH_UP_TOKENS)
