"""What a target says about a batch of text: its tapped layers' outputs and its own next-token scores."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from worker.heads.folder import Trained
from worker.heads.vocabulary import projection
from worker.taps import NoLayers, Taps, inner_model


@dataclass(frozen=True, slots=True)
class Read:
    """Of `tokens` [batch, width + 1]: tapped outputs, embeddings and the target's last states, [batch, width, hidden].

    Position t has what the layers put out for token t, the embedding of token t + 1, and the state that predicts t + 2.
    """

    tokens: mx.array
    taps: list[mx.array]
    embedded: mx.array
    hidden: mx.array

    def arrays(self) -> list[mx.array]:
        """All of it, to be evaluated."""
        return [*self.taps, self.embedded, self.hidden]


class Reader:
    """Runs a target without gradients, tapped until `close`. Raises `NoLayers`."""

    def __init__(self, target: nn.Module, trained: Trained) -> None:
        inner = inner_model(target)
        if inner is None:
            raise NoLayers("this model's last hidden states cannot be reached: no head can be made for it")
        self._inner = inner
        self._taps = Taps(target, trained.config.taps)
        self._trained = trained
        self.vocabulary: int = projection(target).weight.shape[0]  # tokens that the target has logits for

    def read(self, tokens: mx.array) -> Read:
        hidden = self._inner(tokens)
        taps = [mx.stop_gradient(tap[:, :-1]) for tap in self._taps.take()]
        embedded = mx.stop_gradient(self._trained.embed(tokens[:, 1:]))
        return Read(tokens, taps, embedded, mx.stop_gradient(hidden[:, 1:]))

    def close(self) -> None:
        self._taps.remove()
