"""The acceptance rule."""

import pytest

from worker.acceptance import Verdict, accept


@pytest.mark.parametrize(
    ("draft", "own", "left", "verdict"),
    [
        ([], [7], 9, Verdict((7,), 0, None)),
        ([1, 2], [1, 2, 3], 9, Verdict((1, 2, 3), 2, None)),
        ([1, 2], [1, 9, 3], 9, Verdict((1, 9), 1, None)),
        ([1, 2], [9, 2, 3], 9, Verdict((9,), 0, None)),
        ([1, 2], [1, 2, 3], 3, Verdict((1, 2, 3), 2, "length")),
        ([1, 2], [1, 2, 3], 2, Verdict((1, 2), 2, "length")),
        ([1, 2], [1, 0, 3], 9, Verdict((1, 0), 1, "stop")),
        ([1, 0, 5], [1, 0, 5, 6], 9, Verdict((1, 0), 2, "stop")),
        ([0], [0, 4], 1, Verdict((0,), 1, "stop")),
        ([], [0], 1, Verdict((0,), 0, "stop")),
    ],
)
def test_verdicts(draft: list[int], own: list[int], left: int, verdict: Verdict) -> None:
    assert accept(draft, own, left, {0}) == verdict
