"""Rotary embeddings that are left to the kernel that writes keys and values (see `token_attention.py`).

By itself a layer's embedding is two kernels, one for queries and one for keys, on a device where it is the number of
kernels that counts. The modules stay where they are in the model: in a step by token they hand on what they are given.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from worker.cache.ragged import RaggedState
from worker.cache.token_attention import Rotary

KINDS = (nn.RoPE, Llama3RoPE)


def rates_of(rope: Any) -> mx.array:
    """Radians per position of each pair that a module of one of `KINDS` rotates, float32 [dims / 2].

    To the bit those that MLX's CPU backend uses: a row may go through either.
    """
    half = rope.dims // 2
    if isinstance(rope, Llama3RoPE):
        rates: mx.array = 1.0 / rope._freqs.astype(mx.float32)
    else:
        rates = mx.exp(-mx.arange(half) * (mx.log(mx.array(float(rope.base))) / half)) * rope.scale
    mx.eval(rates)
    return rates


def postpone(model: nn.Module, state: RaggedState) -> None:
    """Let this model's rotary embeddings leave the tokens of steps by token as they are, and say so to the step."""
    for module in model.modules():
        if type(module) in KINDS:
            _postpone(module, state)


def _postpone(module: nn.Module, state: RaggedState) -> None:
    kind, rotary = type(module), Rotary(module.dims, bool(module.traditional), rates_of(module))

    def call(self: Any, x: mx.array, offset: Any = 0) -> mx.array:
        step = state.step
        if step is not None and step.is_fused and offset is step.positions:
            step.postpone(x, rotary)
            return x
        made: mx.array = kind.__call__(self, x, offset)
        return made

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
