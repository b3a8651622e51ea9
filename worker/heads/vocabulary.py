"""A model's embedding and its vocabulary projection, whatever its files call them, and some rows of the latter."""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from worker import matrices


class NoVocabulary(ValueError):
    """The model's embedding cannot be told from its other parts."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix [rows, hidden], quantized or not: `rows(hidden)` gives [.., rows]."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"
    unfolded: mx.array | None = None  # see `kept`

    @classmethod
    def of(cls, module: nn.Module, chosen: mx.array | None = None) -> "Rows":
        """Those rows of an embedding or a linear layer; None: all of them."""

        def rows(name: str) -> mx.array | None:
            array = module.get(name)
            return array if array is None or chosen is None else array[chosen]

        weight = rows("weight")
        assert weight is not None
        if "scales" not in module:
            return cls(matrices.ordered(weight), bias=rows("bias"))
        form = module.group_size, module.bits, getattr(module, "mode", "affine")
        return cls(weight, rows("scales"), rows("biases"), rows("bias"), *form)

    def __call__(self, hidden: mx.array) -> mx.array:
        if self.scales is None:
            product = hidden @ self.weight.T
        else:
            product = matrices.quantized_product(
                hidden,
                self.weight,
                self.unfolded,
                scales=self.scales,
                biases=self.biases,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )
        return product if self.bias is None else product + self.bias

    def kept(self) -> "Rows":
        """The same rows, the unfolded matrix beside the quantized one where the device has use and memory for that."""
        if self.scales is None or not matrices.is_kept(matrices.unfolded_bytes(self.weight, self.scales, self.bits)):
            return self
        unfolded = self.matrix()
        mx.eval(unfolded)
        return replace(self, unfolded=unfolded)

    def matrix(self) -> mx.array:
        """The rows as floats, [rows, hidden]."""
        if self.scales is None:
            return self.weight
        return mx.dequantize(
            self.weight,
            scales=self.scales,
            biases=self.biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def embedding(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors. Raises `NoVocabulary`."""
    found = [
        (name.endswith("embed_tokens"), module.weight.shape[0], module)
        for name, module in _outer_modules(model)
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    ]
    if not found:
        raise NoVocabulary("this model has no embedding of token ids that a head could use")
    return max(found, key=lambda entry: entry[:2])[2]


def projection(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits: a linear layer with a row a token, else the embedding."""
    tokens = embedding(model)
    for _, module in _outer_modules(model):
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and module.weight.shape[0] == tokens.weight.shape[0]:
            return module
    return tokens


def _outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if ".layers." not in f".{name}."]
