"""Some of a target's own layers, healed: low-rank adapters make up for the layers that are left out.

The kept layers run on the target's own weights, embedding and vocabulary projection; what was trained are the adapters
on their matrices (LoRA, arXiv 2106.09685). Their keys and values differ from the target's, so they have a cache of
their own, and the target's is never touched.
"""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from worker.heads.vocabulary import Rows, embedding, projection
from worker.taps import NoLayers, inner_model, owner_of_layers


class HealedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`kept`: indexes of the target's layers; `rank` and `scale` of the adapters; `target`: see `identity.py`."""

    target: str
    kept: tuple[int, ...]
    rank: int = 16
    scale: float = 2.0
    kind: str = "layers"

    @property
    def taps(self) -> tuple[int, ...]:
        """It reads nothing of the target's hidden states."""
        return ()


class HealedLayers(nn.Module):
    """Made for a target, whose weights it shares. `vocabulary`: the ids that it is trained to predict, int32 [tokens].

    Only the adapters are trainable. Raises `NoLayers` for a model whose layers cannot be told apart.
    """

    def __init__(self, config: HealedConfig, vocabulary: mx.array, target: nn.Module) -> None:
        super().__init__()
        owner = owner_of_layers(target)
        if wrong := [i for i in config.kept if not 0 <= i < len(owner["layers"])]:
            raise NoLayers(f"layers {wrong} are kept; this model has {len(owner['layers'])}, counted from 0")
        self.layers = [_adapted(owner["layers"][i], config) for i in config.kept]
        # Names that begin with an underscore are no parameters, and what is in a tuple is no part.
        self._config = config
        self._shared = (_with_layers(target, owner, self.layers), embedding(target), projection(target))
        self._vocabulary = vocabulary
        self._rows = Rows.of(projection(target), vocabulary)

    @property
    def config(self) -> HealedConfig:
        return self._config

    @property
    def model(self) -> nn.Module:
        """The model that drafts: the target's with the kept layers alone."""
        return self._shared[0]

    @property
    def vocabulary(self) -> mx.array:
        return self._vocabulary

    @property
    def rows(self) -> Rows:
        """The target's vocabulary projection for `vocabulary`."""
        return self._rows

    def predict_all(self) -> None:
        """Let `vocabulary` be all tokens, as it is where it drafts."""
        self._rows = Rows.of(self._shared[2])
        self._vocabulary = mx.arange(self._shared[2].weight.shape[0], dtype=mx.int32)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [.., hidden] of token ids [..]."""
        embedded: mx.array = self._shared[1](tokens)
        return embedded

    def states(self, tokens: mx.array) -> mx.array:
        """Normed states [batch, width, hidden] of token ids [batch, width], each of which predicts the next token."""
        inner = inner_model(self.model)
        if inner is None:
            raise NoLayers("this model's last hidden states cannot be reached: its layers cannot be healed")
        states: mx.array = inner(tokens)
        return states

    @property
    def adapter(self) -> mx.array:
        """A matrix of the last adapter, [rank, hidden]."""
        last = [module for module in self.layers[-1].modules() if isinstance(module, LoRALinear)][-1]
        matrix: mx.array = last.lora_b
        return matrix

    def adapters(self) -> dict[str, mx.array]:
        """What is trained, by name."""
        return dict(tree_flatten(self.trainable_parameters()))


def _adapted(layer: nn.Module, config: HealedConfig) -> nn.Module:
    """The layer's twin, which shares its weights, with adapters on its matrices."""
    twin = _twin(layer)
    twin.freeze()
    for module in list(twin.modules()):
        for name, child in list(module.items()):
            if isinstance(child, nn.Linear | nn.QuantizedLinear) and child.weight.ndim == 2:
                adapter = LoRALinear.from_base(child, r=config.rank, scale=config.scale)
                adapter.freeze()
                adapter.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
                module[name] = adapter
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """A copy of the module and all within it, but for the arrays, which are shared."""
    twin = copy.copy(module)
    twin._no_grad = set(module._no_grad)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            twin[name] = _twin(child)
        elif isinstance(child, list):
            twin[name] = [_twin(one) if isinstance(one, nn.Module) else one for one in child]
    return twin


def _with_layers(module: nn.Module, owner: nn.Module, layers: Sequence[Any]) -> nn.Module:
    """A copy of a model with other layers, which shares all the rest."""
    changed = copy.copy(module)
    if module is owner:
        changed["layers"] = list(layers)
    for name, child in module.items():
        if isinstance(child, nn.Module) and any(part is owner for part in child.modules()):
            changed[name] = _with_layers(child, owner, layers)
    return changed
