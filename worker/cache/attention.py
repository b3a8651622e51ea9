"""Attention over a ragged cache, in place of `scaled_dot_product_attention` in mlx-lm's model files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from worker import backend, cpu_ops
from worker.cache import token_attention
from worker.cache.layout import AttentionStyle, Group
from worker.cache.ragged import RaggedKVCache, Step, Visibility
from worker.cache.stepping import RECURRENCES, stepwise
from worker.cache.wiring import ATTENTION, model_files

# On a CPU a group is a dozen small operations (some 130 µs), and a score costs an `exp` for each head (100 ns).
CPU_STYLE = AttentionStyle(extent_step=32, group_overhead=1400, folds_heads=True)
# On a GPU one more kernel launch costs more than any padding of a decode step, but not than a prompt's.
GPU_STYLE = AttentionStyle(extent_step=256, group_overhead=65_536, folds_heads=False, doubles_shapes=True)
CUDA_STYLE = replace(GPU_STYLE, by_token=True)


def attention_style() -> AttentionStyle:
    """The way of the default device."""
    return {"cpu": CPU_STYLE, "cuda": CUDA_STYLE}.get(backend.name(), GPU_STYLE)


def install(model: nn.Module) -> None:
    """Let the model's own files call `ragged_attention` when they are given a ragged cache, and step recurrences."""
    for module in model_files(model):
        _replace(module, ATTENTION, _dispatching)
        for name, recurrence in RECURRENCES.items():
            _replace(module, name, partial(stepwise, recurrence=recurrence))


def _replace(module: Any, name: str, made: Callable[[Any], Any]) -> None:
    original = getattr(module, name, None)
    if original is not None and not hasattr(original, "original"):
        replacement = made(original)
        replacement.original = original
        setattr(module, name, replacement)


def _dispatching(original: Any) -> Any:
    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        **options: Any,
    ) -> mx.array:
        if isinstance(cache, RaggedKVCache):
            return ragged_attention(queries, keys, values, cache, scale, mask, **options)
        result: mx.array = original(queries, keys, values, cache=cache, scale=scale, mask=mask, **options)
        return result

    return attention


def ragged_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: RaggedKVCache,
    scale: float,
    mask: Visibility | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of a packed step.

    queries [tokens, heads, 1, head_dim]; keys and values as the cache's `update_and_fetch` gave them;
    returns [tokens, heads, 1, value_dim].
    """
    windows = [window for window in (mask.window if mask else None, cache.window) if window]
    window = min(windows) if windows else None
    step = cache.step
    if step.is_fused:
        queries = cache.take_in(queries, keys, values)
        keys, values = cache.pools
    if step.is_by_token:
        return token_attention.attention(queries, keys, values, step.slots, step.positions, scale, window)
    outputs = [
        _attend(
            queries,
            cache.attended(keys, group),
            cache.attended(values, group),
            step,
            group,
            scale,
            window,
            sinks,
        )
        for group in step.groups
    ]
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    step: Step,
    group: Group,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    heads, kv_heads = queries.shape[1], keys.shape[1]
    folded = heads // kv_heads if step.style.folds_heads and sinks is None else 1
    output = _softmax_attention(
        _padded(queries, step, group, folded),
        keys,
        values,
        scale,
        step.mask(group, window, folded),
        sinks,
    )
    return _packed(output, step, group, folded)


def _softmax_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array, sinks: mx.array | None
) -> mx.array:
    is_folded = queries.shape[1] == keys.shape[1]
    if sinks is None and is_folded and queries.dtype == values.dtype == mx.float32 and cpu_ops.is_usable():
        return cpu_ops.attention(queries, keys, values, scale, mask)
    output: mx.array = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return output


def _padded(queries: mx.array, step: Step, group: Group, folded: int) -> mx.array:
    """[tokens, heads, 1, dim] of the step → [slots, heads / folded, folded × width, dim] of the group."""
    heads, dim = queries.shape[1], queries.shape[3]
    if not group.is_rectangular:
        own = queries[step.gather_index(group)]
    elif group.tokens == queries.shape[0]:
        own = queries
    else:
        own = queries[group.first_token : group.first_token + group.tokens]
    if group.width > 1:
        own = own.reshape(group.slots, group.width, heads // folded, folded, dim).transpose(0, 2, 3, 1, 4)
    elif folded == 1:
        return own
    return own.reshape(group.slots, heads // folded, folded * group.width, dim)


def _packed(output: mx.array, step: Step, group: Group, folded: int) -> mx.array:
    """[slots, heads / folded, folded × width, dim] of the group → [its tokens, heads, 1, dim], and the step's padding
    behind the last group's."""
    heads, dim = output.shape[1] * folded, output.shape[3]
    if group.width > 1:
        split = output.reshape(group.slots, heads // folded, folded, group.width, dim)
        output = split.transpose(0, 3, 1, 2, 4).reshape(group.slots * group.width, heads, 1, dim)
    elif folded > 1:
        output = output.reshape(group.slots, heads, 1, dim)
    is_whole = group.is_rectangular and not (step.padding and step.is_last(group))
    return output if is_whole else output[step.scatter_index(group)]
