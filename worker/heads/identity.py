"""Which model a head belongs to: a hash that stays the same when the model is quantized or converted."""

import hashlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim")


def identity(model: nn.Module, config: dict[str, Any]) -> str:
    """32 hex digits from the sizes in `config` (the model's config.json) and its vectors: norms, mostly.

    Those are never quantized and are taken as bfloat16, so the hash outlives other formats of the same weights.
    A fine-tuned model that changed none of them has the same identity: a head fits it as far as it goes.
    """
    text = config.get("text_config", config)
    digest = hashlib.sha256(repr([(name, text.get(name)) for name in _FIELDS]).encode())
    for name, array in sorted(tree_flatten(model.parameters())):
        if array.ndim == 1 and mx.issubdtype(array.dtype, mx.floating):
            digest.update(name.encode())
            digest.update(repr(mx.view(array.astype(mx.bfloat16), mx.uint16).tolist()).encode())
    return digest.hexdigest()[:32]
