"""What a drafter is built with, and its sizes for a target."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from common.errors import ConfigError
from worker import backend
from worker.drafters.layers import influence_in, most_influential
from worker.heads.folder import HEAD, LAYERS
from worker.heads.head import Head, HeadConfig
from worker.heads.healed import HealedConfig, HealedLayers
from worker.heads.identity import identity
from worker.taps import owner_of_layers

STAGES = ((0.2, 1), (0.7, 4), (1.0, 6))  # up to which share of the training so many passes are unrolled
RANGES: dict[str, tuple[float, float]] = {  # least and most of each number of a plan
    "minutes": (0.01, 10_080),
    "tokens": (0, 10**12),
    "steps": (0, 10**9),
    "writing_share": (0.01, 0.99),
    "long_share": (0, 0.9),
    "rows": (0, 65_536),
    "length": (0, 65_536),
    "batch_rows": (0, 4096),
    "vocabulary": (2, 10**7),
    "layers": (1, 8),
    "mlp_ratio": (0.05, 16),
    "matrix_rate": (1e-6, 1),
    "vector_rate": (1e-7, 1),
    "keep_ratio": (0.01, 0.99),
    "rank": (1, 1024),
    "seed": (0, 2**31 - 1),
}
HELP: dict[str, str] = {
    "minutes": "of writing and training together (kernels, measuring and loading come on top)",
    "tokens": "of text at most (0: no limit)",
    "steps": "of training at most (0: no limit)",
    "writing_share": "of the minutes that goes to writing: what limits a head is mostly the amount of text",
    "long_share": "of the text's rows that ask about longer texts",
    "rows": "written at a time (0: as many as suit the machine)",
    "length": "of a row in tokens (0: 256 on a CPU, 768 elsewhere)",
    "batch_rows": "of a training step (0: 4 on a CPU, 8 elsewhere)",
    "vocabulary": "tokens that the head can predict, the most frequent ones",
    "layers": "of the head",
    "mlp_ratio": "width of the head's MLP, beside the target's own",
    "matrix_rate": "learning rate of matrices (Muon)",
    "vector_rate": "learning rate of everything else (Adam)",
    "keep_ratio": "of the target's layers that --init layers keeps",
    "rank": "of the adapters of --init layers",
    "seed": "of text and weights",
}
_CPU_SIZES = 16, 256, 4  # rows, length, batch_rows …
_GPU_LENGTH, _GPU_BATCH_ROWS = 768, 8
_MOST_ROWS = {"cuda": 1024, "metal": 256}  # … where memory allows, a power of two
_CACHE_SHARE = 0.5  # of the device's memory for the weights and what the rows that are written keep
_CACHE_STEP = 256  # tokens by which mlx-lm's caches grow


class BadPlan(ConfigError):
    """A number of the plan is outside its range."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a build; a build that goes on after a kill must have the same ones.

    `minutes` are those of writing and training together, of which `writing_share` goes to writing; `tokens` (0: no
    limit) ends writing earlier, `steps` (0: no limit) training. `rows`, `length` and `batch_rows` of 0 become what
    suits the machine (`fitted`). Of the rows of text a `long_share` begins with a user turn around texts that were
    written before. `init`: "head" makes one, "layers" heals the `keep_ratio` of the target's own that change most, by
    adapters of this `rank`.
    """

    minutes: float = 10.0
    tokens: int = 0
    steps: int = 0
    writing_share: float = 0.35
    long_share: float = 0.0
    rows: int = 0
    length: int = 0
    batch_rows: int = 0
    vocabulary: int = 16384
    layers: int = 1
    mlp_ratio: float = 1.0  # of the target's own MLP
    matrix_rate: float = 0.02
    vector_rate: float = 0.001
    init: str = HEAD
    keep_ratio: float = 0.5
    rank: int = 16
    seed: int = 0
    stages: tuple[tuple[float, int], ...] = STAGES

    def passes(self, progress: float) -> int:
        """Passes to unroll at this share of the training; layers see the text alone, whatever the pass."""
        if self.init == LAYERS:
            return 1
        return next((passes for until, passes in self.stages if progress < until), self.stages[-1][1])


def check(plan: Plan) -> None:
    """Raises `BadPlan`, naming the option at fault, its value and its limits."""
    for name, (least, most) in RANGES.items():
        value = getattr(plan, name)
        if not least <= value <= most:  # as a NaN is not, either
            raise BadPlan(f"--{name.replace('_', '-')} is {value}; it must lie in [{least:,}, {most:,}]")


def fitted(plan: Plan, model: nn.Module, weights_bytes: int, context_tokens: int) -> Plan:
    """The plan with what it leaves open as it suits this machine; the same one whenever it is asked here."""
    kind = backend.name()
    rows, length, batch_rows = _CPU_SIZES
    if kind != "cpu":
        length, batch_rows = min(_GPU_LENGTH, context_tokens), _GPU_BATCH_ROWS
        room = _CACHE_SHARE * backend.memory_bytes() - weights_bytes
        fitting = int(max(room, 1) / row_bytes(model, plan.length or length))
        rows = min(max(1 << max(fitting.bit_length() - 1, 0), _CPU_SIZES[0]), _MOST_ROWS[kind])
    return msgspec.structs.replace(
        plan, rows=plan.rows or rows, length=plan.length or length, batch_rows=plan.batch_rows or batch_rows
    )


def row_bytes(model: nn.Module, length: int) -> int:
    """What a row of so many tokens keeps in the model's caches, at most."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=cache))
    return sum(int(layer.nbytes) for layer in cache) * -(-length // _CACHE_STEP)


def rate_factor(progress: float, step: int, warmup: int = 30) -> float:
    """Share of the full learning rate: a short warm-up, then down along a cosine to a fiftieth."""
    falling = 0.02 + 0.98 * 0.5 * (1.0 + float(np.cos(np.pi * min(progress, 1.0))))
    return min(1.0, (step + 1) / warmup) * falling


def compute_form() -> mx.Dtype:
    """Floats in which a head is trained: 16 bits everywhere but on a CPU, which is slow at them."""
    return mx.float32 if backend.name() == "cpu" else mx.bfloat16


def head_config(model: nn.Module, config: dict[str, Any], plan: Plan) -> HeadConfig:
    """Sizes like those of the target's own layers. Raises `NoLayers`."""
    text = config.get("text_config", config)
    count = len(owner_of_layers(model)["layers"])
    hidden = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model"))
    head_dim = int(text.get("head_dim") or hidden // int(text.get("num_attention_heads") or max(hidden // 64, 1)))
    heads = int(text.get("num_attention_heads") or hidden // head_dim)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    mlp = int((text.get("intermediate_size") or 4 * hidden) * plan.mlp_ratio)
    return HeadConfig(
        target=identity(model, config),
        taps=tuple(sorted({min(2, count // 2), count // 2, max(count - 3, count // 2)})),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=max(mlp // 64, 1) * 64,
        layers=plan.layers,
        rope_theta=float(text.get("rope_theta") or 10000.0),
        norm_eps=float(text.get("rms_norm_eps") or 1e-5),
    )


def fresh_head(model: nn.Module, config: HeadConfig, vocabulary: np.ndarray[Any, Any], seed: int) -> Head:
    """A head with random weights, but for those that it can take over from the target's last layer and norm."""
    mx.random.seed(seed)
    head = Head(config, mx.array(vocabulary)).bind(model)
    last = dict(tree_flatten(owner_of_layers(model)["layers"][-1].parameters()))
    own = dict(tree_flatten(head.layers[-1].parameters()))
    taken = [(name, last[name]) for name, array in own.items() if name in last and last[name].shape == array.shape]
    head.layers[-1].update(tree_unflatten([(name, array.astype(mx.float32)) for name, array in taken]))
    mx.eval(head.parameters())
    return head


def fresh_layers(
    model: nn.Module,
    config: dict[str, Any],
    vocabulary: np.ndarray[Any, Any],
    text: np.ndarray[Any, Any],
    plan: Plan,
) -> HealedLayers:
    """The target's layers that change `text` (token ids [rows, length]) most, with adapters that add nothing yet.

    Raises `NoLayers`.
    """
    influence = influence_in(model, lambda: model(mx.array(text.astype(np.int32))))
    kept = most_influential(influence, plan.keep_ratio)
    mx.random.seed(plan.seed)
    made = HealedConfig(target=identity(model, config), kept=tuple(kept), rank=plan.rank)
    healed = HealedLayers(made, mx.array(vocabulary), model)
    mx.eval(healed.parameters())
    return healed
