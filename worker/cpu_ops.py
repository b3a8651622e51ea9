"""Faster forms of three operations that MLX's CPU backend computes one number, or one layer, at a time.

Its `exp` takes some 12 ns a number on x86 and stands in every gate and every softmax; rope's sines and cosines are
computed again in each layer, for queries and for keys. The forms here give the same results to float rounding, for any
batch: they are used at every size, since a threshold would let results depend on the batch. They need fused
operations (`mx.compile`), which on a CPU need a C++ compiler; without one nothing is installed.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

from worker import backend

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_ROUNDING = 12582912.0  # 1.5 × 2²³: adding it and taking it away rounds to a whole number
_LEAST_EXPONENT = -126.0
_HIDDEN = -1e30  # score of what a query may not see


def is_usable() -> bool:
    """Whether this process computes on a CPU that can fuse operations."""
    return backend.name() == "cpu" and backend.can_fuse()


def install(model: nn.Module) -> None:
    """Let the model's files gate with `swiglu`, and its rope modules share their tables, where that is of use."""
    if not is_usable():
        return
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        original = getattr(module, "swiglu", None)
        if original is not None and not hasattr(original, "original"):
            module.swiglu = _gating(original)  # type: ignore[attr-defined]
    for part in model.modules():
        if type(part) in (nn.RoPE, Llama3RoPE):
            part.__class__ = _TABLED.setdefault(type(part), _with_tables(type(part)))


# --- exp ----------------------------------------------------------------------------------------------


def _exp_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x) = first × the float whose bits are the second, for x ≤ 0 (2⁻¹²⁶ where less); relative error 1e-6."""
    y = mx.maximum(x * _LOG2_E, _LEAST_EXPONENT)
    whole = (y + _ROUNDING) - _ROUNDING
    f = (y - whole) * _LN_2
    terms = 0.041666668 + f * (0.008333334 + f * 0.0013888889)
    return 1 + f * (1 + f * (0.5 + f * (0.16666667 + f * terms))), (whole.astype(mx.int32) + 127) << 23


@cache
def _fused(function: Callable[..., Any]) -> Any:
    return mx.compile(function, shapeless=True)


def _as_float(bits: mx.array) -> mx.array:
    return mx.view(bits, mx.float32)


# --- gates --------------------------------------------------------------------------------------------


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) × x, for float32 arrays of one shape."""
    fraction, power = _fused(_gate_exp)(gate)
    gated: mx.array = _fused(_gated)(gate, x, fraction, _as_float(power))
    return gated


def _gate_exp(gate: mx.array) -> tuple[mx.array, mx.array]:
    return _exp_parts(-mx.abs(gate))


def _gated(gate: mx.array, x: mx.array, fraction: mx.array, power: mx.array) -> mx.array:
    e = fraction * power
    return gate * x * mx.where(gate >= 0, 1.0, e) / (1 + e)


def _gating(original: Callable[[mx.array, mx.array], mx.array]) -> Callable[[mx.array, mx.array], mx.array]:
    def gate_with(gate: mx.array, x: mx.array) -> mx.array:
        return swiglu(gate, x) if gate.dtype == x.dtype == mx.float32 else original(gate, x)

    gate_with.original = original  # type: ignore[attr-defined]
    return gate_with


# --- attention ----------------------------------------------------------------------------------------


def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array) -> mx.array:
    """Softmax attention of float32 arrays.

    queries [slots, heads, queries, dim], keys and values [slots, heads, extent, dim], mask of what is seen
    [slots, 1 or heads, queries, extent]; returns [slots, heads, queries, value dim]. A query that sees nothing gets
    zeros.
    """
    scores = _fused(_masked)((queries * scale) @ keys.swapaxes(-1, -2), mask)
    fraction, power = _fused(_score_exp)(scores, scores.max(axis=-1, keepdims=True))
    weights = _fused(_weights)(fraction, _as_float(power), mask)
    return (weights @ values) / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, scores, _HIDDEN)


def _score_exp(scores: mx.array, highest: mx.array) -> tuple[mx.array, mx.array]:
    return _exp_parts(scores - highest)


def _weights(fraction: mx.array, power: mx.array, mask: mx.array) -> mx.array:
    return mx.where(mask, fraction * power, 0.0)


# --- rope ---------------------------------------------------------------------------------------------


class RopeTables:
    """Cosines and sines of the newest positions, shared by all layers that rotate alike."""

    def __init__(self) -> None:
        self._positions: mx.array | None = None
        self._tables: dict[tuple[Any, ...], tuple[mx.array, mx.array]] = {}

    def of(self, rope: Any, positions: mx.array) -> tuple[mx.array, mx.array]:
        """[tokens, 1, 1, dims] each: cos twice, and −sin then sin, for `positions` [tokens]."""
        if positions is not self._positions:
            self._positions, self._tables = positions, {}
        key = _signature(rope)
        if key not in self._tables:
            self._tables[key] = _table(rope, positions)
        return self._tables[key]


def _signature(rope: Any) -> tuple[Any, ...]:
    return (rope.dims, rope.base, rope.scale) if hasattr(rope, "base") else (rope.dims, id(rope._freqs))


def _table(rope: Any, positions: mx.array) -> tuple[mx.array, mx.array]:
    half = rope.dims // 2
    if hasattr(rope, "base"):
        inverse = mx.exp(-mx.arange(half) * (mx.log(mx.array(float(rope.base))) / half)) * rope.scale
    else:
        inverse = 1.0 / rope._freqs
    angles = positions.astype(mx.float32)[:, None, None, None] * inverse
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)


def _with_tables(kind: type[nn.Module]) -> type[nn.Module]:
    tables = RopeTables()

    def rotate(self: Any, x: mx.array, offset: Any = 0) -> mx.array:
        is_packed = isinstance(offset, mx.array) and offset.ndim == 1 and x.shape[2] == 1 and x.dtype == mx.float32
        if not is_packed or self.traditional or self.dims != x.shape[-1]:
            plain: mx.array = kind.__call__(self, x, offset=offset)
            return plain
        first, second = mx.split(x, 2, axis=-1)
        cos, sin = tables.of(self, offset)
        rotated: mx.array = _fused(_rotated)(x, mx.concatenate([second, first], axis=-1), cos, sin)
        return rotated

    return type(kind.__name__, (kind,), {"__call__": rotate, "__module__": kind.__module__})


def _rotated(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return x * cos + swapped * sin


_TABLED: dict[type[nn.Module], type[nn.Module]] = {}  # one subclass a kind, so that its tables are shared
