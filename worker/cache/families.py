"""From the caches that a model makes for itself to ragged ones, and to the modules that need rows for them."""

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from worker import product_sizes
from worker.cache import rotary, token_attention
from worker.cache.layout import FEW_SHAPES
from worker.cache.mixers import intercept
from worker.cache.ragged import RaggedKVCache, RaggedState, UnsupportedCache, ragged_cache
from worker.cache.recurrent import RecurrentCache
from worker.cache.wiring import Wiring, members_of, trace

# Model files whose code takes positions from the cache in a way that rows of different lengths break.
REFUSED = {
    "llama4": "its chunked attention counts with one position for the whole batch",
    "llama4_text": "its chunked attention counts with one position for the whole batch",
    "minimax_m3_vl": "its sparse attention counts key blocks from the end of one common cache",
    "deepseek_v41": "it keeps a compressed cache of its own kind",
}

LayerCache = RaggedKVCache | RecurrentCache
RaggedCache = LayerCache | tuple[LayerCache, ...]


def ragged_caches(model: nn.Module, state: RaggedState) -> list[RaggedCache]:
    """One cache a layer, in the form that the model makes for itself: a tuple where mlx-lm has a `CacheList`.

    Modules that must see rows for their cache are intercepted (see `mixers.py`). Raises `UnsupportedCache`.
    """
    name = type(model).__module__.rsplit(".", 1)[-1]
    if reason := REFUSED.get(name):
        raise UnsupportedCache(f"models of the kind {name} are not supported: {reason}")
    originals = make_prompt_cache(model)
    ragged: list[RaggedCache] = []
    for cache in originals:
        members = tuple(_ragged(member, state) for member in members_of(cache))
        ragged.append(members if isinstance(cache, CacheList) else members[0])
    wiring = trace(model, originals, rotary.KINDS)
    for cache, made in zip(originals, ragged, strict=True):
        mixers = _mixers(cache, wiring)
        for module in mixers:
            intercept(module)
        if isinstance(made, RaggedKVCache):
            made.is_plain = not mixers
    is_plain = all(type(cache) is RaggedKVCache and cache.is_plain for cache in ragged)
    state.is_by_token = (
        state.style.by_token and is_plain and all(token_attention.is_usable(form) for form in wiring.forms)
    )
    state.is_fused = state.is_by_token and wiring.is_straight
    if state.is_fused:
        rotary.postpone(model, state)
    if is_plain:
        state.sizes = FEW_SHAPES if state.is_by_token else product_sizes.worthwhile()
    return ragged


def _ragged(cache: Any, state: RaggedState) -> LayerCache:
    return RecurrentCache(state, len(cache.cache)) if type(cache) is ArraysCache else ragged_cache(cache, state)


def _mixers(cache: Any, wiring: Wiring) -> list[nn.Module]:
    """Modules that must be given rows for a cache: none where it only takes part in plain attention."""
    members = members_of(cache)
    if isinstance(cache, CacheList) and not all(id(member) in wiring.receivers for member in members):
        return _receivers(cache, wiring)  # it takes the list apart by itself
    return [m for member in members if id(member) not in wiring.plain for m in _receivers(member, wiring)]


def _receivers(cache: Any, wiring: Wiring) -> list[nn.Module]:
    if type(cache) is not ArraysCache or id(cache) in wiring.receivers:
        return wiring.receivers.get(id(cache), [])
    raise UnsupportedCache("the model keeps a recurrent state that none of its layers is called with")
