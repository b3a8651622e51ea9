"""A head run over whole rows several times, each time on its own output of the time before.

This is what a chain of drafts does at every position of a text at once (EAGLE-3's training-time test, arXiv
2503.01840). In pass j the query at position t sees keys of pass 0 up to t − j, and one key of each later pass.
"""

import mlx.core as mx
from mlx_lm.models.llama import TransformerBlock

from worker.heads.head import Head

Pair = tuple[mx.array, mx.array]


def unroll(head: Head, features: mx.array, embedded: mx.array, passes: int) -> list[mx.array]:
    """Hidden states [batch, width, hidden] of each pass. In pass j those before position j mean nothing."""
    known: list[list[Pair]] = [[] for _ in head.layers]
    outputs: list[mx.array] = []
    width = features.shape[1]
    distance = mx.arange(width)[:, None] - mx.arange(width)[None]  # of query and key
    for number in range(passes):
        hidden = head.inject(features, embedded)
        mask = mx.where(distance >= number, 0.0, -1e9).astype(features.dtype)
        for layer, pairs in zip(head.layers, known, strict=True):
            hidden = hidden + _attend(layer, hidden, pairs, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        outputs.append(hidden)
        features = _later(hidden, 1, 1)
    return outputs


def _attend(layer: TransformerBlock, hidden: mx.array, pairs: list[Pair], mask: mx.array) -> mx.array:
    attention, (batch, width, _) = layer.self_attn, hidden.shape
    normed = layer.input_layernorm(hidden)
    heads, kv_heads = int(attention.n_heads), int(attention.n_kv_heads or attention.n_heads)
    queries = _by_head(attention.q_proj(normed), heads)
    keys, values = _by_head(attention.k_proj(normed), kv_heads), _by_head(attention.v_proj(normed), kv_heads)
    queries, keys = attention.rope(queries) * attention.scale, attention.rope(keys)
    pairs.append((keys, values))
    last = len(pairs) - 1
    queries = queries.reshape(batch, kv_heads, heads // kv_heads, width, -1)
    scores = queries @ pairs[0][0][:, :, None].swapaxes(-1, -2) + mask  # [batch, kv_heads, repeats, width, width]
    own = [(_later(pairs[i][0], last - i, 2), _later(pairs[i][1], last - i, 2)) for i in range(1, last + 1)]
    single = [(queries * key[:, :, None]).sum(axis=-1, keepdims=True) for key, _ in own]
    shares = mx.softmax(mx.concatenate([scores, *single], axis=-1), axis=-1, precise=True)
    mixed = shares[..., :width] @ pairs[0][1][:, :, None]
    for i, (_, value) in enumerate(own):
        mixed = mixed + shares[..., width + i : width + i + 1] * value[:, :, None]
    mixed = mixed.reshape(batch, heads, width, -1).transpose(0, 2, 1, 3).reshape(batch, width, -1)
    output: mx.array = attention.o_proj(mixed)
    return output


def _by_head(array: mx.array, heads: int) -> mx.array:
    batch, width, _ = array.shape
    return array.reshape(batch, width, heads, -1).transpose(0, 2, 1, 3)


def _later(array: mx.array, places: int, axis: int) -> mx.array:
    """The array moved on by so many places along an axis, zeros coming in."""
    if not places:
        return array
    zeros = list(array.shape)
    zeros[axis] = places
    parts = mx.split(array, [array.shape[axis] - places], axis=axis)
    return mx.concatenate([mx.zeros(zeros, array.dtype), parts[0]], axis=axis)
