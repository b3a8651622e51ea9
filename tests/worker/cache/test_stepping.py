"""Recurrences one token at a time."""

import mlx.core as mx

from worker.cache.stepping import Recurrence, stepping, stepwise


def total(x: mx.array, gain: float, state: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """A running sum [rows, width] that says into how many calls it was cut."""
    calls.append(x.shape[1])
    sums = mx.cumsum(gain * x, axis=1) + (0 if state is None else state)
    return sums, sums[:, -1:]


calls: list[int] = []


def test_tokens_go_one_by_one_only_while_stepping() -> None:
    stepped = stepwise(total, Recurrence(("x",), "state", 1))
    x = mx.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    calls.clear()
    whole, last = stepped(x, 2.0)
    assert calls == [3]
    with stepping(True):
        parts, last_of_parts = stepped(x, gain=2.0, state=None)
        with stepping(False):
            stepped(x, 2.0)
    assert calls == [3, 1, 1, 1, 3]
    assert mx.array_equal(whole, parts)
    assert mx.array_equal(last, last_of_parts)
