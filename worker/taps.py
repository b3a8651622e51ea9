"""Reading, and standing in for, single layers of any mlx-lm model during its forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class NoLayers(ValueError):
    """The model's layers cannot be reached, or they are not as many as are asked for."""


class Taps:
    """Holds what chosen layers put out in the latest forward of a model, in the order of their indexes.

    It keeps references and computes nothing. Outputs have the shape in which the model runs, [batch, width, hidden] or
    [tokens, 1, hidden]. The layers stay what they are: only their class is one that tells. Raises `NoLayers`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        all_layers = owner_of_layers(model)["layers"]
        if wrong := [i for i in layers if not 0 <= i < len(all_layers)]:
            raise NoLayers(f"layers {wrong} are asked for; this model has {len(all_layers)}, counted from 0")
        self.layers = tuple(sorted(set(layers)))
        self._told: dict[int, mx.array] = {}
        self._tapped = [all_layers[i] for i in self.layers]
        for i, layer in zip(self.layers, self._tapped, strict=True):
            layer.__class__ = _telling(type(layer), i, self._told)

    def take(self) -> list[mx.array]:
        """The outputs of the latest forward, which are then let go. Raises `NoLayers` if a layer put none out."""
        if missing := [i for i in self.layers if i not in self._told]:
            raise NoLayers(f"layers {missing} put out no hidden states: this kind of model cannot be tapped there")
        outputs = [self._told[i] for i in self.layers]
        self._told.clear()
        return outputs

    def remove(self) -> None:
        """Let the layers be as they were; taps are removed in the reverse of the order in which they were made."""
        for layer in self._tapped:
            layer.__class__ = type(layer).__bases__[0]
        self._tapped = []


def _telling(kind: type[nn.Module], index: int, told: dict[int, mx.array]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        output = kind.__call__(self, *args, **options)
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, mx.array):
            told[index] = hidden
        return output

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@contextmanager
def replaced(model: nn.Module, make: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    """Within it each layer of the model is what `make` gives for its index and itself. Raises `NoLayers`."""
    owner = owner_of_layers(model)
    layers = owner["layers"]
    owner["layers"] = [make(i, layer) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        owner["layers"] = layers


def owner_of_layers(model: nn.Module) -> nn.Module:
    """The module whose list `layers` the model runs through. Raises `NoLayers`."""
    for module in model.modules():
        if isinstance(module.get("layers"), list) and len(module["layers"]) > 1:
            return module
    raise NoLayers("this model's layers are not in a list of their own: they can neither be left out nor read")


def inner_model(model: nn.Module) -> nn.Module | None:
    """The part of a model between its input and its vocabulary projection, None if it cannot be told."""
    text = getattr(model, "language_model", model)
    parts = [getattr(text, name, None) for name in ("model", "backbone", "transformer")]
    return next((part for part in parts if isinstance(part, nn.Module)), None)
