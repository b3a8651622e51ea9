"""The draft-length controller: pure decisions over chances and step times."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.drafters.controller import PROBE_TOKENS, PROBE_TOKENS_MAX, Candidate, Controller, Costs, Decision, expected

FREE = Costs(lambda tokens: 1.0)
DEAR = Costs(lambda tokens: tokens)


def copy(row: str, length: int, match: int, must_probe: bool = False) -> Candidate:
    return Candidate(row, "ngram", length, match, must_probe)


def decided(controller: Controller, candidates: list[Candidate], costs: Costs) -> Decision:
    """In a step in which each row has a candidate."""
    return controller.decide(candidates, controller.reaches(candidates), len(candidates), costs)


def lengths(controller: Controller, candidates: list[Candidate], costs: Costs) -> list[int]:
    return list(decided(controller, candidates, costs).lengths)


def chance(controller: Controller, row: str, drafter: str, match: int, depth: int) -> float:
    """That the draft token at `depth` is accepted if those before it were."""
    reaches = controller.reaches([Candidate(row, drafter, depth + 1, match)])[0]
    return float(reaches[depth] / reaches[depth - 1]) if depth else float(reaches[0])


def taught(row: str, match: int, drafted: int, accepted: int, times: int = 50) -> Controller:
    controller = Controller()
    for _ in range(times):
        controller.observe(row, "ngram", match, drafted, accepted)
    return controller


def test_drafts_all_where_verification_is_free() -> None:
    assert lengths(Controller(), [copy("a", 3, 3), copy("b", 1, 1)], FREE) == [3, 1]


def test_drafts_nothing_where_a_token_costs_as_much_as_a_step() -> None:
    assert lengths(Controller(), [copy("a", 5, 3), copy("b", 2, 1)], DEAR) == [0, 0]


def test_a_row_that_fails_is_left_alone_and_one_that_succeeds_is_not() -> None:
    controller = taught("good", 3, 4, 4)
    for _ in range(50):
        controller.observe("bad", "ngram", 1, 4, 0)
    costs = Costs(lambda n: 1 + 0.1 * n)
    assert lengths(controller, [copy("good", 6, 3), copy("bad", 6, 1)], costs) == [6, 0]


def test_a_step_up_in_the_cost_is_taken_whole_or_not_at_all() -> None:
    """Time as a staircase: up to 8 tokens cost one tile, 9 to 16 two; a sure draft of 12 is worth the second tile."""
    sure = taught("a", 5, 8, 8)
    assert lengths(sure, [copy("a", 12, 5)], Costs(lambda n: np.where(n <= 8, 1.0, 1.2))) == [12]
    assert lengths(sure, [copy("a", 12, 5)], Costs(lambda n: np.where(n <= 8, 1.0, 3.0))) == [7]


def test_a_probe_drafts_one_token_at_any_price() -> None:
    assert lengths(Controller(), [copy("a", 5, 3, must_probe=True), copy("b", 5, 3)], DEAR) == [1, 0]
    assert lengths(Controller(), [copy("a", 0, 0, must_probe=True)], DEAR) == [0]


def test_a_row_that_left_is_forgotten() -> None:
    controller = taught("a", 2, 4, 0)
    assert chance(controller, "a", "ngram", 2, 0) < chance(controller, "new", "ngram", 2, 0) + 1e-9
    controller.forget("a")
    assert not controller.rows


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1.0), min_size=60, max_size=60),
)
def test_never_expects_less_than_plain(proposals: list[tuple[int, int]], increments: list[float]) -> None:
    times = np.cumsum(increments)
    candidates = [copy(str(i), length, match) for i, (length, match) in enumerate(proposals)]
    controller, rows = Controller(), len(proposals)
    decision = decided(controller, candidates, Costs(lambda n: times[n]))
    assert all(0 <= n <= c.length for n, c in zip(decision.lengths, candidates, strict=True))
    granted = [msgspec.structs.replace(c, length=n) for c, n in zip(candidates, decision.lengths, strict=True)]
    gained = rows + float(expected(granted, controller.reaches(candidates)).sum())
    assert math.isclose(decision.goodput, gained / times[rows + sum(decision.lengths)])
    assert decision.goodput >= rows / times[rows] - 1e-9


def test_a_drafter_that_computes_pays_for_each_position_once_for_all_its_rows() -> None:
    """A drafting step costs four tenths of a step: one row does not gain enough by it, eight do."""
    controller = Controller(priors={("model", 0): [0.6]})
    costs = Costs(lambda tokens: 1.0, {"model": lambda rows: 0.9})
    rows = [Candidate(str(i), "model", 4, 0) for i in range(8)]
    assert lengths(controller, rows[:1], costs) == [0]
    shared = Costs(lambda tokens: 1.0, {"model": lambda rows: 0.4})
    assert lengths(controller, rows, shared) == [1] * 8
    assert decided(controller, rows, shared).draft_s == 0.4


def test_drafts_that_promise_next_to_nothing_are_left_out() -> None:
    """What is expected and what it costs are estimates, and the choice falls on those that are too good."""
    controller = Controller(priors={("model", 0): [0.6]})
    rows = [Candidate(str(i), "model", 1, 0) for i in range(8)]
    promised = {
        price: lengths(controller, rows, Costs(lambda tokens: 1.0, {"model": lambda rows, price=price: price}))
        for price in (0.45, 0.48)
    }
    assert promised == {0.45: [1] * 8, 0.48: [0] * 8}  # 0.6 tokens a row, which are 1.33 and 1.25 times the price


@pytest.mark.parametrize("rows", [8, 100])
def test_a_single_row_that_can_draft_for_nothing_does(rows: int) -> None:
    controller = taught("ngram", 5, 8, 8)
    decision = controller.decide([copy("a", 3, 5)], controller.reaches([copy("a", 3, 5)]), rows, FREE)
    assert decision.lengths == (3,)


def test_of_drafts_that_promise_nearly_the_same_the_shortest_are_made() -> None:
    controller = taught("ngram", 5, 8, 8)
    rows = [copy(str(i), 8, 5) for i in range(8)]
    free = decided(controller, rows, FREE)
    nearly_free = decided(controller, rows, Costs(lambda tokens: 1.0 + 0.1 * (tokens - 8)))
    assert sum(nearly_free.lengths) < sum(free.lengths)
    most = max((8 + n) / (1.0 + 0.1 * n) for n in range(60))  # if all stood for sure
    assert nearly_free.goodput < most


def test_greedy_and_sampled_rows_are_expected_to_accept_as_they_do() -> None:
    controller = Controller(priors={("head", 0): [0.6], ("head", 1): [0.4]})
    for _ in range(100):
        controller.observe("a", "head", 1, 1, 0)
    controller.forget("a")
    assert chance(controller, "b", "head", 0, 0) == 0.6
    assert chance(controller, "b", "head", 1, 0) < 0.1


def test_a_parked_row_probes_again_after_ever_more_tokens() -> None:
    controller = Controller()
    waits = []
    for _ in range(7):
        tokens = 0
        while not controller.must_probe("a"):
            controller.went_plain("a", 1)
            tokens += 1
        waits.append(tokens)
        assert controller.parked == 1
        controller.observe("a", "ngram", 1, 1, 0)
        assert controller.parked == 0
    assert waits == [min(PROBE_TOKENS * 2**i, PROBE_TOKENS_MAX) for i in range(7)]
    controller.observe("a", "ngram", 1, 1, 1)
    assert controller.rows["a"].probe_after == PROBE_TOKENS
    assert controller.probes == 7


def test_tokens_are_taken_by_their_chance_whoever_drafts_them() -> None:
    """By hand: each token costs 0.3 of a step of 2 tokens, so those are drafted that stand with more than that share
    of what the step gains; the second of `sure` stands rather than the first of `poor`."""
    controller = taught("sure", 8, 3, 3)
    controller = Controller(controller.model | taught("poor", 1, 1, 0).model)
    sure, poor = copy("a", 3, 8), copy("b", 3, 1)
    assert chance(controller, "b", "ngram", 1, 0) < 0.1 < 0.8 < chance(controller, "a", "ngram", 8, 2)
    assert lengths(controller, [poor, sure], Costs(lambda n: 1.0 + 0.3 * (n - 2))) == [0, 3]


def test_a_drafter_that_was_given_up_has_another_chance_later() -> None:
    controller = Controller(priors={("head", 0): [0.6, 0.5]})
    assert [round(chance(controller, "a", "head", 0, depth), 9) for depth in (0, 1, 7)] == [0.6, 0.5, 0.5]
    for _ in range(60):
        controller.observe("a", "head", 0, 1, 0)
        controller.forget("a")
    given_up = chance(controller, "a", "head", 0, 0)
    assert given_up < 0.15
    for _ in range(5000):
        controller.rest("head")
    assert 0.55 < chance(controller, "a", "head", 0, 0) < 0.6
    controller.rest("other")
