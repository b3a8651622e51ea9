"""How a model's matrices lie in memory and how products with them are made, as suits the device.

A small model's step is hundreds of small products, each with a cost of its own: layers that read the same input
(queries, keys and values; gate and up) are joined. The model's files stay as they are: the joined layers know each
other, and the first that is asked answers for all.

A BLAS copies a matrix that it multiplies by; stored as [inputs, outputs] that copy is cheaper, by a quarter to a half
of the product. MLX's CUDA kernels for quantized matrices are made for a few tokens: for more of them unfolding the
matrix first is several times faster; of a model that is small beside the device's memory the unfolded matrices are
kept. (Figures in docs/measurements.md.)
"""

import copy
import inspect
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from worker import backend

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj")
_JOINED = {"cpu": (_ATTENTION,), "cuda": (_ATTENTION, _GATED)}  # by device; on Metal nobody has tried it yet
_ARRAYS = ("weight", "scales", "biases", "bias")  # whose first axis are a layer's outputs
_STORED = "_by_inputs"  # where a layer has its matrix as [inputs, outputs] …
_UNFOLDED = "_unfolded"  # … and a quantized one has it unfolded; no parameters, by their names
_FORM = ("group_size", "bits", "mode")

# On CUDA a quantized matrix is unfolded for at least so many tokens, if it is so long or there is so much to do.
_UNFOLD_TOKENS = 8
_UNFOLD_INPUTS = 1024
_UNFOLD_PRODUCTS = 1 << 25
_KEPT_SHARE = 16  # all unfolded matrices are kept if they take a sixteenth of the device's memory at most


def install(model: nn.Module) -> None:
    """Join what can be joined in this model and order its matrices for the default device; in place, once.

    Values are the same, and so is the memory they take, but for one layer's while it is moved, and for what
    `kept_bytes` says.
    """
    device, quantized = backend.name(), list[nn.Module]()
    for module in model.modules():
        for names in _JOINED.get(device, ()):
            if _read_the_same(module, names):
                whole = _join([module[name] for name in names])
                quantized += [whole] if isinstance(whole, nn.QuantizedLinear) else []
                _multiply_by_inputs(whole)
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Embedding):
            module.weight = ordered(module.weight)
            _multiply_by_inputs(module)
        elif type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            quantized.append(module)
    if device == "cuda":
        for module in quantized:
            module.__class__ = _multiplying(type(module))
        _keep_unfolded(model, quantized)


def kept_bytes(model: nn.Module) -> int:
    """What unfolded matrices take beside this model's own arrays."""
    return int(getattr(model, "unfolded_bytes", 0))


def _keep_unfolded(model: nn.Module, quantized: Sequence[nn.Module]) -> None:
    """Unfold the matrices of these layers once and for all, if there is memory enough."""
    needed = sum(unfolded_bytes(layer.weight, layer.scales, layer.bits) for layer in quantized)
    if not needed or not is_kept(needed):
        return
    for layer in quantized:
        layer[_UNFOLDED] = mx.dequantize(layer.weight, **_form_of(layer))
        mx.eval(layer[_UNFOLDED])
    model.unfolded_bytes = needed


def ordered(matrix: mx.array) -> mx.array:
    """[outputs, inputs] in the order that the default device multiplies by fastest; evaluated if it changes."""
    if backend.name() != "cpu" or matrix.dtype != mx.float32 or matrix.ndim != 2:
        return matrix
    stored = mx.contiguous(matrix.T)
    mx.eval(stored)
    return stored.T


def _multiply_by_inputs(layer: nn.Module) -> None:
    """Let a layer whose matrix is `ordered` multiply by it as it is stored: without turning it round in every step."""
    if type(layer) is nn.Linear and backend.name() == "cpu":
        layer[_STORED] = layer.weight.T
        mx.eval(layer[_STORED])
        layer.__class__ = ByInputs


class ByInputs(nn.Linear):
    """A linear layer with its matrix as [inputs, outputs] besides, the same memory."""

    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = mx.addmm(self.bias, x, self[_STORED]) if "bias" in self else x @ self[_STORED]
        return product


def unfolded_bytes(weight: mx.array, scales: mx.array, bits: int) -> int:
    """What a quantized matrix takes once it is unfolded."""
    return int(weight.nbytes * 8 // bits * max(scales.dtype.size, 2))


def is_kept(needed_bytes: int) -> bool:
    """Whether unfolded matrices of so many bytes are kept on the default device."""
    return backend.name() == "cuda" and needed_bytes <= backend.memory_bytes() // _KEPT_SHARE


def quantized_product(x: mx.array, weight: mx.array, unfolded: mx.array | None = None, **form: Any) -> mx.array:
    """x [.., inputs] times a quantized matrix [outputs, packed inputs]: [.., outputs].

    `unfolded` [outputs, inputs]: the same matrix, where it is kept. `form`: scales, biases, group_size, bits and mode
    as `mx.quantized_matmul` takes them.
    """
    tokens, inputs = x.size // x.shape[-1], x.shape[-1]
    if backend.name() != "cuda" or not is_unfolded(tokens, inputs, weight.shape[0], is_kept=unfolded is not None):
        product: mx.array = mx.quantized_matmul(x, weight, transpose=True, **form)
        return product
    matrix = mx.dequantize(weight, **form) if unfolded is None else unfolded
    return x @ matrix.astype(x.dtype).T


def is_unfolded(tokens: int, inputs: int, outputs: int, *, is_kept: bool = False) -> bool:
    """Whether CUDA makes such a product faster from an unfolded matrix, which has to be made first or is kept."""
    is_worth_it = is_kept or inputs >= _UNFOLD_INPUTS or tokens * inputs * outputs >= _UNFOLD_PRODUCTS
    return tokens >= _UNFOLD_TOKENS and is_worth_it


def _form_of(layer: Any) -> dict[str, Any]:
    """How a layer's matrix is quantized, as MLX's functions take it."""
    arrays = {name: layer[name] for name in ("scales", "biases") if name in layer}
    return arrays | {name: getattr(layer, name) for name in _FORM}


def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    """A quantized layer or embedding that makes its products with `quantized_product`."""

    def product(self: Any, x: mx.array) -> mx.array:
        made = quantized_product(x, self["weight"], self.get(_UNFOLDED), **_form_of(self))
        return made + self["bias"] if "bias" in self else made

    name = "as_linear" if issubclass(kind, nn.QuantizedEmbedding) else "__call__"
    return type(kind.__name__, (kind,), {name: product, "__module__": kind.__module__})


# --- joining ------------------------------------------------------------------------------------------


def _read_the_same(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether the module has layers of these names and one form, and calls them all with the same variable."""
    layers = [module.get(name) for name in names]
    if len({_form(layer) for layer in layers}) > 1 or type(layers[0]) not in (nn.Linear, nn.QuantizedLinear):
        return False
    source = inspect.getsource(type(module).__call__)
    read = [re.findall(rf"self\.{name}\((\w+)\)", source) for name in names]
    return all(len(arguments) == 1 for arguments in read) and len({arguments[0] for arguments in read}) == 1


def _form(layer: Any) -> tuple[Any, ...]:
    if not isinstance(layer, nn.Module):
        return ()
    arrays = [(name, layer[name].dtype, layer[name].shape[1:]) for name in _ARRAYS if name in layer]
    return type(layer), *arrays, *(getattr(layer, name, None) for name in _FORM)


def _join(layers: Sequence[nn.Module]) -> nn.Module:
    """Let these layers be views of one; returns that."""
    ends = list(accumulate(layer.weight.shape[0] for layer in layers))
    whole = copy.copy(layers[0])
    for name in _ARRAYS:
        if name not in whole:
            continue
        joined = mx.concatenate([layer[name] for layer in layers])
        joined = ordered(joined) if name == "weight" else joined
        mx.eval(joined)
        whole[name] = joined
        for layer, start, end in zip(layers, [0, *ends], ends, strict=False):
            layer[name] = joined[start:end]
    together = _Joined(whole, ends[:-1])
    for place, layer in enumerate(layers):
        _open(layer, together, place)
    return whole


class _Joined:
    """Layers that are one: the product of all of them is kept until each has been asked for its part."""

    def __init__(self, whole: nn.Module, splits: list[int]) -> None:
        self._whole = whole
        self._splits = splits
        self._input: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def part(self, place: int, x: mx.array) -> mx.array:
        """What the layer at `place` makes of x."""
        if x is not self._input or place not in self._parts:
            self._input, self._parts = x, dict(enumerate(mx.split(self._whole(x), self._splits, axis=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._input = None
        return part


def _open(layer: nn.Module, together: _Joined, place: int) -> None:
    kind = type(layer)

    def call(self: Any, x: mx.array) -> mx.array:
        return together.part(place, x)

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
