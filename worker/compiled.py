"""A target's forward as one compiled function of a step's arrays, where its shape is the number of tokens alone.

Building a graph of some 600 operations in Python takes as long as computing it on a GPU; compiled, it is built once for
each number of tokens (see `layout.FEW_SHAPES`) and size of the pools.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

from worker.cache.ragged import RaggedKVCache, RaggedState

Pools = list[list[mx.array]]
Body = Callable[..., list[mx.array]]


class CompiledStep:
    """Calls `body(*arrays)`, which reads and writes `caches`, compiled. The step must be one by token.

    `on_compile` is called whenever a new shape is about to be compiled.

    `arrays` and what `body` returns are plain arrays; those of the step and the pools go in and out besides.
    """

    def __init__(
        self,
        body: Body,
        caches: Sequence[RaggedKVCache],
        state: RaggedState,
        on_compile: Callable[[], None] = lambda: None,
    ) -> None:
        self._body = body
        self._caches = caches
        self._state = state
        self._on_compile = on_compile
        self._function = mx.compile(self._traced)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """What `body` returns, not evaluated."""
        step = self._state.step
        assert step is not None and step.is_by_token
        if not all([cache.make_room() for cache in self._caches]):
            return self._body(*arrays)  # the first step ever makes the pools
        outputs, pools = self._function(arrays, step.slots, step.positions, [cache.pools for cache in self._caches])
        for cache, own in zip(self._caches, pools, strict=True):
            cache.pools = own
        return outputs

    def _traced(
        self, arrays: Sequence[mx.array], slots: mx.array, positions: mx.array, pools: Pools
    ) -> tuple[list[mx.array], Pools]:
        self._on_compile()
        step = self._state.step
        assert step is not None
        for cache, own in zip(self._caches, pools, strict=True):
            cache.pools = own
        with step.traced(slots, positions):
            outputs = self._body(*arrays)
        return outputs, [cache.pools for cache in self._caches]
