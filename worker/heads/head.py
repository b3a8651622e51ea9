"""A draft head: the target's hidden states and the next token's embedding go through one transformer layer.

Position t takes what the target's tapped layers put out for token t, and the embedding of token t + 1, and predicts
token t + 2 (after EAGLE-3, arXiv 2503.01840). In a chain the head's own output stands for the features of a token that
the target has not seen yet. Logits are the target's own vocabulary projection over a part of its vocabulary (FR-Spec,
arXiv 2502.14856).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.llama import ModelArgs, TransformerBlock

from worker.heads.vocabulary import Rows, embedding, projection


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a head. `taps`: indexes of the target's layers that it reads; `target`: see `heads/identity.py`."""

    target: str
    taps: tuple[int, ...]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    layers: int = 1
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    bits: int = 0  # of its matrices; 0: as floats
    group_size: int = 64
    kind: str = "head"


class Head(nn.Module):
    """Bound to its target by `bind`; `vocabulary` are the target's ids that it can predict, int32 [tokens]."""

    def __init__(self, config: HeadConfig, vocabulary: mx.array) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.fuse_norms = [nn.RMSNorm(size, eps=eps) for _ in config.taps]
        self.fuse_proj = nn.Linear(len(config.taps) * size, size, bias=False)
        self.feature_norm = nn.RMSNorm(size, eps=eps)
        self.embedding_norm = nn.RMSNorm(size, eps=eps)
        self.inject_proj = nn.Linear(2 * size, size, bias=False)
        self.layers = [TransformerBlock(_llama_args(config)) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(size, eps=eps)
        # Names that begin with an underscore are no parameters.
        self._config = config
        self._vocabulary = vocabulary
        self._rows: Rows | None = None
        self._embedding: list[nn.Module] = []  # in a list, so that the target's part is not taken for the head's own

    @property
    def config(self) -> HeadConfig:
        return self._config

    @property
    def vocabulary(self) -> mx.array:
        return self._vocabulary

    @property
    def rows(self) -> Rows:
        """The target's vocabulary projection for `vocabulary`."""
        assert self._rows is not None, "bind the head to its target first"
        return self._rows

    def bind(self, target: nn.Module) -> "Head":
        """Use the embedding and the vocabulary projection of this target; returns the head."""
        self._embedding = [embedding(target)]
        self._rows = Rows.of(projection(target), self._vocabulary).kept()
        return self

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [.., hidden] of the target's token ids [..]."""
        embedded: mx.array = self._embedding[0](tokens)
        return embedded

    def fuse(self, taps: Sequence[mx.array]) -> mx.array:
        """Features [.., hidden] of what the tapped layers put out, [.., hidden] each."""
        normed = [norm(tap) for norm, tap in zip(self.fuse_norms, taps, strict=True)]
        fused: mx.array = self.fuse_proj(mx.concatenate(normed, axis=-1))
        return fused

    def inject(self, features: mx.array, embedded: mx.array) -> mx.array:
        """The layers' input [.., hidden]: features of token t with the embedding of token t + 1."""
        both = mx.concatenate([self.embedding_norm(embedded), self.feature_norm(features)], axis=-1)
        injected: mx.array = features + self.inject_proj(both)
        return injected

    def __call__(
        self, features: mx.array, embedded: mx.array, cache: Sequence[Any] | None = None, mask: Any = None
    ) -> mx.array:
        """Hidden states before the final norm, which are the features of the next position in a chain.

        [batch, width, hidden] with mask "causal", or packed [tokens, 1, hidden] with one ragged cache a layer.
        """
        hidden = self.inject(features, embedded)
        for layer, own in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, mask, own)
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """[.., tokens of `vocabulary`] of what `__call__` gives."""
        return self.rows(self.norm(hidden))


def _llama_args(config: HeadConfig) -> ModelArgs:
    return ModelArgs(
        model_type="llama",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        intermediate_size=config.mlp_size,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        vocab_size=1,
        rope_theta=config.rope_theta,
    )
