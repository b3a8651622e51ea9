"""Runs a model's mixers (recurrent layers, latent attention) in packed steps, block by block.

A mixer is the innermost module that is called with a layer's cache. Its class is replaced by a subclass that, given one
of our caches, takes the packed arguments [tokens, 1, …] apart into blocks [rows, width, …], runs the original on each
with a cache in the form that it knows, and packs what it returns. Given any other cache it does what it always did.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import ArraysCache

from worker.cache.blocks import Block, attention_blocks, recurrent_blocks, token_order
from worker.cache.latent import BlockKV, IgnoredKV, block_mask
from worker.cache.projections import Products, RecalledPass, SharedPass, during, open_layers
from worker.cache.ragged import RaggedKVCache, RaggedState, Step, Visibility
from worker.cache.recurrent import LiveBlock, RecurrentCache, pick_rows
from worker.cache.stepping import stepping

_Arguments = dict[str, Any]  # of one call, by name


def intercept(module: nn.Module) -> None:
    """Let a module run block by block when it is called with a ragged cache."""
    kind = type(module)
    if hasattr(kind, "mixes"):
        return

    open_layers(module)
    shaped = _with_folded_masks if _folds_heads(module) else _unchanged
    names = list(inspect.signature(kind.__call__).parameters)[1:]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: _Arguments = dict(zip(names, args, strict=False)) | kwargs
        at = next((name for name, value in given.items() if _is_ragged(value)), None)
        if at is None:
            return kind.__call__(self, *args, **kwargs)
        return _mix(lambda arguments: kind.__call__(self, **shaped(arguments)), given, at)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "mixes": True})


def _folds_heads(module: nn.Module) -> bool:
    """Whether its scores are [rows, kv_heads, repeats, width, extent]: gemma2 computes them by itself."""
    return type(module).__module__.endswith(".gemma2") and getattr(module, "repeats", 1) > 1


def _with_folded_masks(arguments: _Arguments) -> _Arguments:
    is_folded = {name: "mask" in name and isinstance(value, mx.array) for name, value in arguments.items()}
    return {name: value[:, :, None] if is_folded[name] else value for name, value in arguments.items()}


def _unchanged(arguments: _Arguments) -> _Arguments:
    return arguments


def _is_ragged(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_ragged(member) for member in value)
    return isinstance(value, RaggedKVCache | RecurrentCache)


def _mix(run: Callable[[_Arguments], Any], given: _Arguments, at: str) -> Any:
    """One call of a mixer, whose cache is the argument `at`, for all blocks of the step."""
    members = given[at] if isinstance(given[at], tuple) else (given[at],)
    state: RaggedState = members[0].state
    step = state.step
    assert step is not None
    shared = SharedPass()
    recurrent = next((member for member in members if isinstance(member, RecurrentCache)), None)
    with during(shared):
        if recurrent is None:
            extent_step = step.style.extent_step if len(members) > 1 else None  # a list: one of them chooses among keys
            blocks = step.remember(
                ("attention blocks", extent_step), lambda: attention_blocks(step.segments, extent_step)
            )
            outputs = [_run_attention(run, given, at, step, block, shared) for block in blocks]
        else:
            blocks = step.remember(("recurrent blocks",), lambda: recurrent_blocks(step.segments))
            lives = recurrent.live_blocks(blocks)
            outputs = [_run_recurrent(run, given, at, step, live, shared) for live in lives]
    return _packed(step, blocks, outputs, shared)


def _run_attention(
    run: Callable[[_Arguments], Any], given: _Arguments, at: str, step: Step, block: Block, shared: SharedPass
) -> Any:
    cache = given[at]
    members = cache if isinstance(cache, tuple) else (cache,)
    views = tuple(BlockKV(member, step, block) for member in members)
    arguments, _ = _begin(given, step, block, shared)
    arguments[at] = views if isinstance(cache, tuple) else views[0]
    return run(_masked(arguments, members[0], step, block))


def _run_recurrent(
    run: Callable[[_Arguments], Any], given: _Arguments, at: str, step: Step, live: LiveBlock, shared: SharedPass
) -> Any:
    block, cache = live.block, given[at]
    arguments, products = _begin(given, step, block, shared)
    if isinstance(cache, tuple):
        arguments[at] = tuple(
            live.cache if isinstance(member, RecurrentCache) else BlockKV(member, step, block) for member in cache
        )
        attended = next(member for member in cache if isinstance(member, RaggedKVCache))
        arguments = _masked(arguments, attended, step, block)
    else:
        arguments[at] = live.cache
        arguments = {name: None if isinstance(value, Visibility) else value for name, value in arguments.items()}
    if not block.stands and block.width > 1:
        live.calls.append(_Recorded(run, arguments, at, block, products).replay)
    with stepping(not block.stands):
        return run(arguments)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One call of a mixer with one block's arguments, and what its linear layers made of them."""

    run: Callable[[_Arguments], Any]
    arguments: _Arguments
    at: str
    block: Block
    products: Products

    def replay(self, states: ArraysCache, rows: Sequence[int], tokens: int) -> None:
        """Run it again over the first `tokens` tokens of some rows, for the states that it leaves in `states`."""

        def cut(value: Any) -> Any:
            if isinstance(value, mx.array) and value.shape[:2] == (self.block.rows, self.block.width):
                return _present(pick_rows(value, rows))[:, :tokens]
            if isinstance(value, mx.array) and value.shape == (self.block.rows,):
                return pick_rows(value, rows)
            return value

        again = {name: None if _is_mask(name, value) else cut(value) for name, value in self.arguments.items()}
        cache = self.arguments[self.at]
        again[self.at] = (
            tuple(states if isinstance(member, ArraysCache) else IgnoredKV(member, rows) for member in cache)
            if isinstance(cache, tuple)
            else states
        )
        with stepping(True), during(RecalledPass(self.products, cut)):
            self.run(again)


def _begin(given: _Arguments, step: Step, block: Block, shared: SharedPass) -> tuple[_Arguments, Products]:
    """A block's arguments, and where the products of its linear layers are noted."""
    arguments = _of_block(given, step, block)
    parts = [(arguments[name], value) for name, value in given.items() if _is_by_token(value, step)]
    return arguments, shared.begin(parts, lambda value: _rows(value, step, block))


def _of_block(given: _Arguments, step: Step, block: Block) -> _Arguments:
    """The arguments as one block's: [tokens, 1, …] as [rows, width, …], and positions [tokens] as those of its rows."""

    def taken(value: Any) -> Any:
        if not isinstance(value, mx.array):
            return value
        if _is_by_token(value, step):
            return _rows(value, step, block)
        if value.shape == (step.tokens,):
            return _taken(value, step, block).reshape(block.rows, block.width)[:, 0]
        return value

    return {name: taken(value) for name, value in given.items()}


def _is_by_token(value: Any, step: Step) -> bool:
    return isinstance(value, mx.array) and value.shape[:2] == (step.tokens, 1)


def _rows(value: mx.array, step: Step, block: Block) -> mx.array:
    """[tokens, 1, …] → [rows, width, …]."""
    return _taken(value, step, block).reshape(block.rows, block.width, *value.shape[2:])


def _taken(value: mx.array, step: Step, block: Block) -> mx.array:
    """A block's tokens of an array [tokens, …]."""
    if block.first_token is not None:
        return value[block.first_token : block.first_token + len(block.tokens)]
    return value[step.remember(("tokens", block.tokens), lambda: mx.array(block.tokens, dtype=mx.int32))]


def _masked(arguments: _Arguments, cache: RaggedKVCache, step: Step, block: Block) -> _Arguments:
    """The arguments with the block's own mask in place of the note that the model's top level was given."""
    notes = [value.window for value in arguments.values() if isinstance(value, Visibility)]
    windows = [window for window in (*notes, cache.window) if window]
    mask = block_mask(step, block, min(windows) if windows else None)
    return {name: mask if _is_mask(name, value) else value for name, value in arguments.items()}


def _is_mask(name: str, value: Any) -> bool:
    return isinstance(value, Visibility) or "mask" in name


def _packed(step: Step, blocks: Sequence[Block], outputs: Sequence[Any], shared: SharedPass) -> Any:
    """What a mixer returned for each block, [rows, width, …], as [tokens, 1, …]; tuples are packed one by one."""
    order = step.remember(("order", id(blocks)), lambda: _index(token_order(blocks)))

    def joined(parts: Sequence[mx.array]) -> mx.array:
        flat = [part.reshape(-1, 1, *part.shape[2:]) for part in parts]
        together = flat[0] if len(flat) == 1 else mx.concatenate(flat)
        return together if order is None else together[order]

    def packed(*parts: Any) -> Any:
        if not isinstance(parts[0], mx.array):
            return parts[0]
        if len(parts) > 1 and (last := shared.last_layer(parts)):
            layer, given = last
            return layer(joined(given))
        return joined(parts)

    return tree_map(packed, outputs[0], *outputs[1:])


def _index(places: list[int] | None) -> mx.array | None:
    return None if places is None else mx.array(places, dtype=mx.int32)


def _present(array: mx.array | None) -> mx.array:
    assert array is not None
    return array
