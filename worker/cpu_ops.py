"""Faster forms of operations that MLX's CPU backend computes one number, or one layer, or one step of many at a time.

Its `exp` takes some 12 ns a number on x86 and stands in every gate and every softmax; rope's sines and cosines are
computed again in each layer, for queries and for keys; a norm is eleven operations, each of which takes the host some
5 µs. The forms here give the same results to float rounding, for any batch: they are used at every size, since a
threshold would let results depend on the batch. They need fused operations (`mx.compile`), which on a CPU need a C++
compiler; without one nothing is installed.
"""

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from math import factorial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from worker import backend
from worker.cache.rotary import KINDS, rates_of

_LOG2_E = 1.4426950408889634
_TERMS = [0.6931471805599453**k / factorial(k) for k in range(1, 7)]  # of 2^f
_ROUNDING = 12582912.0  # 1.5 × 2²³: adding it and taking it away rounds to a whole number
_LARGEST_EXPONENT = 126.0
_HIDDEN = -1e30  # score of what a query may not see
_RATES = "_rates"  # where a rope module has its rates; no parameter, by its name
SHAPES_KEPT = 1024  # combinations of shapes, of all functions together; each takes some 50 KB


def is_usable() -> bool:
    """Whether this process computes on a CPU that can fuse operations."""
    return backend.name() == "cpu" and backend.can_fuse()


def install(model: nn.Module) -> None:
    """Let the model's files gate with `swiglu`, its rope modules share their tables, and fuse its norms, where that is
    of use."""
    if not is_usable():
        return
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        original = getattr(module, "swiglu", None)
        if original is not None and not hasattr(original, "original"):
            module.swiglu = _gating(original)  # type: ignore[attr-defined]
    for part in model.modules():
        if type(part) in KINDS:
            part[_RATES] = rates_of(part)
            part.__class__ = _TABLED.setdefault(type(part), _with_tables(type(part)))
        elif type(part) is nn.RMSNorm:
            part.__class__ = _FusedNorm


# --- fused functions ----------------------------------------------------------------------------------


@lru_cache(maxsize=SHAPES_KEPT)
def _compiled(function: Callable[..., Any], *_shapes: tuple[int, ...]) -> Any:
    return mx.compile(function)


def _fused(function: Callable[..., Any], *arrays: mx.array) -> Any:
    """What `function` makes of these, in as few passes as possible.

    Each combination of shapes has a function of its own, which takes a millisecond to trace. One for all shapes
    (`shapeless`) would have to broadcast before every operation and come apart into several times as many passes: a
    pass is at most eleven operations deep. The compiled code is the same for all shapes.
    """
    return _compiled(function, *(array.shape for array in arrays))(*arrays)


# --- exp ----------------------------------------------------------------------------------------------


def _exp2(y: mx.array, same: mx.array) -> tuple[mx.array, mx.array]:
    """2^y as two factors, for -126 ≤ y ≤ 126; relative error 2e-7.

    Each is one pass if `same` has the values of `y` but no operation in common with it: an operation that two results
    share would be a pass of its own.
    """
    f = y - ((y + _ROUNDING) - _ROUNDING)
    square = f * f
    low = (1.0 + _TERMS[0] * f) + (_TERMS[1] + _TERMS[2] * f) * square
    high = (_TERMS[3] + _TERMS[4] * f) + _TERMS[5] * square
    whole = (same + _ROUNDING) - _ROUNDING
    return low + high * (square * square), mx.view((whole.astype(mx.int32) + 127) << 23, mx.float32)


# --- gates --------------------------------------------------------------------------------------------


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) × x, for float32 arrays of one shape."""
    gated: mx.array = _fused(_gated, gate, x)
    return gated


def _gated(gate: mx.array, x: mx.array) -> mx.array:
    y = mx.minimum(mx.maximum(gate * -_LOG2_E, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)
    same = mx.maximum(mx.minimum(-(gate * _LOG2_E), _LARGEST_EXPONENT), -_LARGEST_EXPONENT)
    fraction, power = _exp2(y, same)
    return gate * x / (1 + mx.contiguous(fraction) * power)  # with all of it one pass would be too deep


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
    attended: mx.array = _fused(_attending(scale), queries, keys, values, mask)
    return attended


@cache
def _attending(scale: float) -> Callable[..., mx.array]:
    def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
        scores = mx.where(mask, (queries @ keys.swapaxes(-1, -2)) * (scale * _LOG2_E), _HIDDEN)
        highest = scores.max(axis=-1, keepdims=True)
        y = mx.maximum(scores - highest, -_LARGEST_EXPONENT)
        same = mx.maximum(-(highest - scores), -_LARGEST_EXPONENT)
        fraction, power = _exp2(y, same)
        weights = mx.where(mask, fraction * power, 0.0)
        return (weights @ values) / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)

    return attend


# --- norms --------------------------------------------------------------------------------------------


def _with_fused_norm(kind: type[nn.Module]) -> type[nn.Module]:
    def norm(self: Any, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or self.weight.dtype != mx.float32:
            plain: mx.array = kind.__call__(self, x)
            return plain
        rates = _fused(_rates(x.shape[-1], self.eps), mx.square(x).sum(axis=-1, keepdims=True))
        normed: mx.array = _fused(_normed, x, rates, self.weight)
        return normed

    return type(kind.__name__, (kind,), {"__call__": norm, "__module__": kind.__module__})


@cache
def _rates(size: int, eps: float) -> Callable[[mx.array], mx.array]:
    """Of rows of `size` elements. By themselves: in one pass with what follows they would be made for each element."""

    def rates(squares: mx.array) -> mx.array:
        return mx.rsqrt(squares * (1 / size) + eps)

    return rates


def _normed(x: mx.array, rates: mx.array, weight: mx.array) -> mx.array:
    """In MLX's own order, and so with the same bits."""
    return weight * (x * rates)


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
            self._tables[key] = _table(rope[_RATES], positions)
        return self._tables[key]


def _signature(rope: Any) -> tuple[Any, ...]:
    return (rope.dims, rope.base, rope.scale) if hasattr(rope, "base") else (rope.dims, id(rope._freqs))


def _table(rates: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
    angles = positions.astype(mx.float32)[:, None, None, None] * rates
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
        rotated: mx.array = _fused(_rotated, x, mx.concatenate([second, first], axis=-1), cos, sin)
        return rotated

    return type(kind.__name__, (kind,), {"__call__": rotate, "__module__": kind.__module__})


def _rotated(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return x * cos + swapped * sin


_TABLED: dict[type[nn.Module], type[nn.Module]] = {}  # one subclass a kind, so that its tables are shared
_FusedNorm = _with_fused_norm(nn.RMSNorm)
