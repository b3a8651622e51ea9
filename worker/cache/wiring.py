"""Which of a model's modules use which cache: learned from a forward with its own caches, built but not computed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """The form of a call of the attention function."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: mx.Dtype
    has_options: bool  # sinks and the like


@dataclass
class Wiring:
    """What a forward did with its caches; caches are told apart by `id`, so they must outlive this.

    `receivers`: the innermost modules that were called with a cache. `plain`: key-value caches whose keys, values and
    mask went to the attention function just as they came from the cache. `forms`: how that function was called.
    `is_straight`: each cache was written and read once, and what rotary embeddings made went as it was to the cache, as
    keys, and to the attention function, as queries, of the same layer.
    """

    receivers: dict[int, list[nn.Module]] = field(default_factory=dict)
    plain: set[int] = field(default_factory=set)
    forms: set[AttentionForm] = field(default_factory=set)
    is_straight: bool = False


def trace(model: nn.Module, caches: Sequence[Any], rotaries: Sequence[type[nn.Module]] = ()) -> Wiring:
    """Build a forward of two tokens with the model's own, empty caches and see where each goes.

    `rotaries`: the classes of rotary embeddings whose results are followed.
    """
    members = [member for cache in caches for member in members_of(cache)]
    calls = _Calls({id(cache) for cache in (*caches, *members)})
    attention = _AttentionCalls(members)
    rotated: list[Any] = []
    with ExitStack() as watched:
        for kind in {type(module) for module in model.modules() if callable(module)}:
            watched.enter_context(_replaced(kind, "__call__", calls.watching(kind.__call__)))
            if kind in rotaries:
                watched.enter_context(_replaced(kind, "__call__", _noting(kind.__call__, rotated)))
        for file in model_files(model):
            if hasattr(file, ATTENTION):
                watched.enter_context(_replaced(file, ATTENTION, attention.watching(getattr(file, ATTENTION))))
        model(mx.zeros((1, 2), dtype=mx.int32), cache=list(caches))
    return Wiring(calls.innermost, attention.plain(), attention.forms, attention.is_straight(rotated))


def members_of(cache: Any) -> tuple[Any, ...]:
    """The caches that a `CacheList` holds; a cache of another kind itself."""
    return tuple(cache.caches) if isinstance(cache, CacheList) else (cache,)


def model_files(model: nn.Module) -> list[Any]:
    """The Python modules in which the classes of a model stand."""
    return [sys.modules[name] for name in sorted({type(part).__module__ for part in model.modules()})]


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a class or module, replaced for a while; an inherited one is inherited again afterwards."""
    is_own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _noting(original: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """The same function, whose results are kept."""

    def call(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    return call


class _Calls:
    """Calls of modules with one of the known caches among their arguments."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.innermost: dict[int, list[nn.Module]] = {}
        self._below: list[dict[int, list[nn.Module]]] = [{}]  # for each call in progress: who got what inside it

    def watching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            received = {id(a) for a in (*args, *kwargs.values())} & self.known
            self._below.append({})
            try:
                return original(module, *args, **kwargs)
            finally:
                self._end(module, received, self._below.pop())

        return call

    def _end(self, module: nn.Module, received: set[int], below: dict[int, list[nn.Module]]) -> None:
        for cache in received:
            others = [other for other in below.get(cache, []) if other is not module]
            known = self.innermost.setdefault(cache, [])
            if not others and not any(module is other for other in known):
                known.append(module)
            below.setdefault(cache, []).append(module)
        for cache, modules in below.items():
            self._below[-1].setdefault(cache, []).extend(modules)


class _AttentionCalls:
    """What key-value caches gave, and what the attention function got."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self._fetched: dict[int, list[tuple[Any, Any]]] = {}
        self._given: dict[int, Any] = {}  # the keys that went into a cache, by what came out
        self._masks: list[Any] = []
        self._called: list[tuple[Any, Any, Any]] = []
        self._queries: list[Any] = []  # of each of these calls
        self.forms: set[AttentionForm] = set()
        for cache in caches:
            if hasattr(cache, "update_and_fetch"):
                cache.update_and_fetch = self._fetching(cache, cache.update_and_fetch)
            if hasattr(cache, "make_mask"):
                cache.make_mask = self._masking(cache.make_mask)

    def watching(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(queries: Any, keys: Any, values: Any, cache: Any, scale: Any, mask: Any, **options: Any) -> Any:
            self._called.append((keys, values, mask))
            self._queries.append(queries)
            self.forms.add(_form(queries, keys, values, options))
            return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **options)

        return call

    def plain(self) -> set[int]:
        return {cache for cache, pairs in self._fetched.items() if all(self._went_straight(*pair) for pair in pairs)}

    def is_straight(self, rotated: Sequence[Any]) -> bool:
        """See `Wiring.is_straight`; `rotated` is what rotary embeddings made."""
        fetched = [id(keys) for pairs in self._fetched.values() for keys, _ in pairs]
        if sorted(fetched) != sorted(id(keys) for keys, _, _ in self._called):
            return False
        is_rotated = {id(made) for made in rotated}
        given = [(id(q), id(self._given[id(k)])) for q, (k, _, _) in zip(self._queries, self._called, strict=True)]
        is_paired = all((q in is_rotated) == (k in is_rotated) for q, k in given)
        return is_paired and is_rotated <= {one for pair in given for one in pair}

    def _went_straight(self, keys: Any, values: Any) -> bool:
        masks = [mask for k, v, mask in self._called if k is keys and v is values]
        return bool(masks) and all(m is None or isinstance(m, str) or self._is_made(m) for m in masks)

    def _is_made(self, mask: Any) -> bool:
        return any(mask is made for made in self._masks)

    def _fetching(self, cache: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(keys: Any, values: Any) -> Any:
            fetched = original(keys, values)
            self._given[id(fetched[0])] = keys
            self._fetched.setdefault(id(cache), []).append(fetched)
            return fetched

        return call

    def _masking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mask = original(*args, **kwargs)
            self._masks.append(mask)
            return mask

        return call


def _form(queries: mx.array, keys: mx.array, values: mx.array, options: Any) -> AttentionForm:
    is_special = any(value is not None for value in options.values())
    heads, kv_heads = queries.shape[1], keys.shape[1]
    return AttentionForm(heads, kv_heads, queries.shape[-1], values.shape[-1], queries.dtype, is_special)
