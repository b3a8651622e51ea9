"""Linear layers inside mixers see all tokens of a step at once, though the mixer runs block by block.

Their weights are most of what a mixer reads, and would be read again for every block and every replay. A layer that is
given a mixer's own argument is applied to the packed argument once, and each block takes its tokens of the product. If
what a mixer returns is just what one of its layers made, that layer is applied once to what all blocks gave it; the
blocks' own products are then never computed. A replay takes what its layers made in the step.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

_Layer = Callable[[mx.array], mx.array]


class _Pass(Protocol):
    def project(self, key: int, layer: _Layer, x: mx.array) -> mx.array: ...


_passes: list[_Pass] = []  # the one in progress last; all MLX work is one thread's


@contextmanager
def during(current: _Pass) -> Iterator[None]:
    """While on, linear layers that were opened ask `current` for their products."""
    _passes.append(current)
    try:
        yield
    finally:
        _passes.pop()


def open_layers(mixer: nn.Module) -> None:
    """Let the linear layers of a mixer ask the pass in progress.

    Not of one that compiles its own methods (kimi_k3): a compiled function would keep one step's products for ever.
    """
    if "mx.compile(self" in inspect.getsource(type(mixer)):
        return
    for layer in mixer.modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear):
            _open(layer)


def _open(layer: nn.Module) -> None:
    kind = type(layer)

    def call(self: Any, x: mx.array) -> mx.array:
        if not _passes:
            return kind.__call__(self, x)
        return _passes[-1].project(id(self), lambda given: kind.__call__(self, given), x)

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


Products = dict[int, list[mx.array]]  # of each layer, in the order of its calls: [rows, width, …]


@dataclass(slots=True)
class SharedPass:
    """One call of a mixer in a step, for all of its blocks."""

    _wholes: dict[tuple[int, int], mx.array] = field(default_factory=dict)
    _made: dict[int, tuple[int, _Layer, mx.array, mx.array]] = field(default_factory=dict)  # by the product's id
    _packed: dict[int, mx.array] = field(default_factory=dict)  # packed argument, by the id of the block's part of it
    _take: Callable[[mx.array], mx.array] | None = None
    _products: Products = field(default_factory=dict)

    def begin(self, parts: Sequence[tuple[mx.array, mx.array]], take: Callable[[mx.array], mx.array]) -> Products:
        """Start a block: its parts of the packed arguments, and how it takes its part of another.

        Returns where the products of its layers are noted, for replays.
        """
        self._packed = {id(part): packed for part, packed in parts}
        self._take, self._products = take, {}
        return self._products

    def project(self, key: int, layer: _Layer, x: mx.array) -> mx.array:
        packed = self._packed.get(id(x))
        if packed is None or self._take is None:
            product = layer(x)
            self._made[id(product)] = key, layer, x, product  # the product is held so that its id stays its own
        else:
            whole = self._wholes.get((key, id(packed)))
            if whole is None:
                whole = self._wholes[key, id(packed)] = layer(packed)
            product = self._take(whole)
        if x.ndim >= 3:
            self._products.setdefault(key, []).append(product[:])  # the mixer may change its own in place
        return product

    def last_layer(self, outputs: Sequence[mx.array]) -> tuple[_Layer, list[mx.array]] | None:
        """The layer that made all of the blocks' outputs, and what they gave it; None if that was no layer."""
        made = [self._made.get(id(output)) for output in outputs]
        found = [entry for entry in made if entry is not None]
        if len(found) < len(made) or len({key for key, *_ in found}) > 1:
            return None
        return found[0][1], [x for _, _, x, _ in found]


@dataclass(slots=True)
class RecalledPass:
    """A replay of a mixer: products [rows, width, …] of the step, cut to the replayed rows and tokens by `cut`."""

    products: Products
    cut: Callable[[mx.array], mx.array]
    _calls: dict[int, int] = field(default_factory=dict)

    def project(self, key: int, layer: _Layer, x: mx.array) -> mx.array:
        if x.ndim < 3:  # a mixer that goes token by token itself
            return layer(x)
        call = self._calls.get(key, 0)
        self._calls[key] = call + 1
        return self.cut(self.products[key][call])
