"""Recurrences of mlx-lm that compute many tokens by another formula than one, taken one token at a time for drafts.

The chunked formulas (state-space duality in Mamba 2's kin, lightning attention, RWKV's kernel with its wider registers)
agree with single steps to rounding only. Where drafts are verified the tokens go one by one, as in plain decoding, so
that the results are its own; the projections around them still see all tokens at once. Prompts keep the chunked form.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A function (tokens…, state) → (outputs, state): which parameters run over time and along which axis."""

    over_time: tuple[str, ...]
    state: str
    axis: int


RECURRENCES = {
    "ssm_update": Recurrence(("hidden_states", "B", "C", "dt"), "state", 1),
    "recurrent_gla": Recurrence(("q", "k", "v"), "h", 2),
    "wkv7_kernel": Recurrence(("r", "w", "k", "v", "a", "b"), "state", 1),
}

_is_stepping = False  # all MLX work is one thread's


@contextmanager
def stepping(is_on: bool) -> Iterator[None]:
    """While on, the recurrences of installed models take one token at a time."""
    global _is_stepping
    before, _is_stepping = _is_stepping, is_on
    try:
        yield
    finally:
        _is_stepping = before


def stepwise(original: Callable[..., Any], recurrence: Recurrence) -> Callable[..., Any]:
    """The same recurrence, one token at a time while `stepping` is on."""
    signature = inspect.signature(original)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _is_stepping:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        width = given[recurrence.over_time[0]].shape[recurrence.axis]
        outputs = []
        for t in range(width):
            now = {name: _at(given[name], t, recurrence.axis) for name in recurrence.over_time}
            output, given[recurrence.state] = original(**(given | now))
            outputs.append(output)
        return mx.concatenate(outputs, axis=recurrence.axis), given[recurrence.state]

    return call


def _at(array: mx.array, t: int, axis: int) -> mx.array:
    return array[:, t : t + 1] if axis == 1 else array[:, :, t : t + 1]
