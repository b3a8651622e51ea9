"""What drafting costs beside its forwards is measured: looking for drafts, and steps with computed ones."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.worker import tiny
from worker.drafters.controller import Controller, Decision
from worker.drafters.drafter import Ask, CopyingDrafter, Draft, Offer, Pending
from worker.drafters.looks import MOST_SKIPPED
from worker.drafting import Drafting
from worker.request import Row
from worker.step_times import GRID, Array, StepTimes
from worker.time_factors import Kind

STEP_S = 1.0


def flat() -> StepTimes:
    """Steps take a second, whatever is in them."""
    return StepTimes([STEP_S] * len(GRID))


class Dear(StepTimes):
    """Steps with computed drafts take so many times what their parts do."""

    factor = 1.0

    def computed(self, tokens: Array) -> Array:
        return np.full(len(tokens), self.factor)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Slow(CopyingDrafter):
    """Looks for `look_s` and finds something only when it is told to."""

    name = "slow"

    def __init__(self, clock: Clock, look_s: float) -> None:
        self.clock, self.look_s, self.looks, self.finds = clock, look_s, 0, False

    def offer(self, row: Row, limit: int) -> Offer | None:
        self.looks += 1
        self.clock.now_s += self.look_s
        return Offer(self.name, 1, 8, (5,)) if self.finds else None

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """Nothing is kept."""


class Computing(Slow):
    """Says that its tokens cost next to nothing."""

    def offer(self, row: Row, limit: int) -> Offer | None:
        return Offer(self.name, 2, 0)

    computes = True

    def step_s(self, rows: Array) -> Array | float:
        return 1e-3

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        made = mx.zeros(2, mx.int32)
        return [Draft(self.name, 0, ask.length, None, Pending(made, tuple(range(ask.length)))) for ask in asks]


def a_row() -> Row:
    row = Row.of(tiny.make_request(0, max_tokens=100), 0, 0.0)
    row.cached = len(row.tokens) - 1
    return row


def drafted(drafting: Drafting, steps: int, times: StepTimes | None = None) -> list[int]:
    rows, times = [a_row()], times or flat()
    return [drafting.drafts(rows, times)[0][0].length for _ in range(steps)]


def a_step(drafting: Drafting, times: StepTimes, computed_s: float) -> None:
    """One step, which takes so long if it has computed drafts."""
    (draft,), draft_s = drafting.drafts([a_row()], times)
    if drafting.is_computed:
        times.observe(1 + draft.length, computed_s, Kind.COMPUTED, draft_s)
    else:
        times.observe(1, STEP_S)


def extra(times: StepTimes) -> float:
    """What a step of three tokens takes more if drafts are computed in it, as a share."""
    return float(times.computed(np.array([3]))[0]) - 1.0


def test_looks_that_cost_nothing_are_made_in_every_step() -> None:
    clock = Clock()
    drafter = Slow(clock, look_s=0.001)
    drafted(Drafting({"slow": drafter}, ("slow",), clock=clock), 50)
    assert drafter.looks == 50


def test_dear_looks_that_find_nothing_become_rare_and_frequent_again_when_they_find_something() -> None:
    clock = Clock()
    drafter = Slow(clock, look_s=0.5)
    drafting = Drafting({"slow": drafter}, ("slow",), clock=clock)
    drafted(drafting, 200)
    assert 200 / (MOST_SKIPPED + 1) <= drafter.looks < 25
    drafter.finds = True
    assert sum(drafted(drafting, 40)[-20:]) >= 19  # one of them plain at most


def test_a_row_that_is_searched_in_vain_is_searched_rarely_and_the_others_are_not() -> None:
    class Picky(Slow):
        def __init__(self, clock: Clock) -> None:
            super().__init__(clock, 0.1)
            self.searched = [0, 0]

        def offer(self, row: Row, limit: int) -> Offer | None:
            self.searched[row.slot] += 1
            self.finds = row.slot == 1
            return super().offer(row, limit)

    clock = Clock()
    picky, computing = Picky(clock), Computing(clock, 0.0)
    computing.name = "computing"
    drafting = Drafting({"slow": picky, "computing": computing}, ("slow", "computing"), clock=clock)
    drafting.controller.priors = {("computing", 0): [0.1]}
    rows = [a_row(), a_row()]
    rows[1] = Row.of(tiny.make_request(1, max_tokens=100), 1, 0.0)
    rows[1].cached = len(rows[1].tokens) - 1
    made = [drafting.drafts(rows, flat())[0] for _ in range(100)]
    looks = sum(any(draft.length for draft in drafts) for drafts in made)
    assert all(drafts[0].drafter == "computing" for drafts in made if drafts[0].length)
    assert picky.searched[1] == looks > 90 and 100 / (MOST_SKIPPED + 1) - 1 <= picky.searched[0] < 20


def test_a_step_without_rows_that_decode_is_no_look_in_vain() -> None:
    drafting = Drafting({"slow": Slow(Clock(), 0.5)}, ("slow",), clock=Clock())
    assert all(drafting.drafts([], flat()) == ([], 0.0) for _ in range(10))
    assert drafting.looks.count == 0


def test_a_draft_beside_prompts_costs_what_it_adds_to_their_step() -> None:
    """A step of up to 64 tokens takes a second, each one beyond it another."""
    knee = StepTimes([max(1.0, 1.0 + size - 64) for size in GRID])
    line = StepTimes([1.0 + 0.1 * size for size in GRID])

    def length(times: StepTimes, beside: int) -> int:
        drafter = Slow(Clock(), look_s=0.0)
        drafter.finds = True
        return Drafting({"slow": drafter}, ("slow",), clock=drafter.clock).drafts([a_row()], times, beside)[0][0].length

    assert [length(knee, beside) for beside in (0, 20, 62, 63, 100)] == [1, 1, 1, 0, 0]
    assert [length(line, beside) for beside in (0, 20, 500)] == [1, 1, 1]  # the prompts' time is not the draft's


def test_looks_that_save_less_than_they_take_become_rare() -> None:
    """A copy of one token, which stands with 0.75, in a step that takes no longer for it: it saves 0.75 of a step."""
    for look_s, is_rare in ((0.7, False), (0.8, True)):
        clock = Clock()
        drafter = Slow(clock, look_s)
        drafter.finds = True
        drafting = Drafting({"slow": drafter}, ("slow",), clock=clock)
        made = drafted(drafting, 200)
        assert (drafter.looks < 25) == is_rare
        assert drafter.looks == sum(made)  # what was found is used
        assert round(drafting.look_s, 6) in (0.0, look_s)


def test_what_cannot_pay_is_not_weighed_against_copies() -> None:
    class Counting(Controller):
        plans = 0

        def decide(self, *args: Any) -> Decision:
            self.plans += 1
            return super().decide(*args)

    controller = Counting(priors={("slow", 0): [0.3, 0.2]})
    drafting = Drafting({"slow": Computing(Clock(), 0.0)}, ("slow",), controller=controller, clock=Clock())
    times = Dear(flat().seconds)
    times.factor = 1.37  # more than the 0.36 tokens that are expected are worth
    assert drafted(drafting, 1, times) == [0] and controller.plans == 1
    times.factor = 1.2
    assert drafted(drafting, 1, times) == [2] and controller.plans == 3


def test_computed_drafts_that_take_longer_than_said_are_given_up() -> None:
    clock = Clock()
    drafting, times = Drafting({"slow": Computing(clock, 0.0)}, ("slow",), clock=clock), flat()
    assert drafted(drafting, 1) == [2]
    for _ in range(100):
        a_step(drafting, times, 3.5)
    assert not any(drafted(drafting, 10, times))
    assert times.predict(1) == pytest.approx(STEP_S, rel=0.02)  # a plain step is none the dearer


def test_what_made_computed_drafts_dear_is_forgotten_while_nobody_computes() -> None:
    clock = Clock()
    drafting, times = Drafting({"slow": Computing(clock, 0.0)}, ("slow",), clock=clock), flat()
    for _ in range(100):
        a_step(drafting, times, 3.5)
    drafting.controller.observe("0", "slow", 0, 2, 0)  # a little worse as well
    assert not any(drafted(drafting, 20, times))
    extras = [extra(times)]
    while not drafting.is_computed:
        a_step(drafting, times, 3.5)
        extras.append(extra(times))
    assert 20 < len(extras) < 3000  # another try
    assert extras[-2] < 0.9 * extras[0] and extras[-1] > extras[-2]


def test_a_step_that_catches_up_says_so() -> None:
    class Behind(Computing):
        def catches_up(self, rows: Sequence[Row]) -> bool:
            return True

    for kind in (Computing, Behind):
        drafting = Drafting({"slow": kind(Clock(), 0.0)}, ("slow",), clock=Clock())
        assert drafted(drafting, 1) == [2]
        assert drafting.catches_up == (kind is Behind)
        assert drafted(drafting, 1) == [0]  # the plain step in between
        assert not drafting.catches_up


def test_plain_steps_are_frequent_at_first() -> None:
    clock = Clock()
    drafter = Slow(clock, 0.0)
    drafter.finds = True
    made = drafted(Drafting({"slow": drafter}, ("slow",), clock=clock), 100)
    assert [i for i, length in enumerate(made) if not length][:6] == [1, 4, 9, 18, 35, 60]


def test_noise_in_both_directions_makes_no_price() -> None:
    clock = Clock()
    drafting, times = Drafting({"slow": Computing(clock, 0.0)}, ("slow",), clock=clock), flat()
    prices = []
    for number in range(200):
        a_step(drafting, times, (STEP_S + 0.002) * (1.4 if number % 2 else 0.6))
        prices.append(extra(times))
    assert sum(prices[100:]) / 100 < 0.03
