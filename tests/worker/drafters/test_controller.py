"""The draft-length controller: pure decisions over chances and step times."""

from hypothesis import given
from hypothesis import strategies as st

from worker.drafters.controller import Candidate, Controller


def free(tokens: int) -> float:
    return 1.0


def dear(tokens: int) -> float:
    return float(tokens)


def taught(row: str, match: int, drafted: int, accepted: int, times: int = 50) -> Controller:
    controller = Controller()
    for _ in range(times):
        controller.observe(row, match, drafted, accepted)
    return controller


def test_drafts_all_where_verification_is_free() -> None:
    assert Controller().decide([Candidate("a", 5, 3), Candidate("b", 2, 1)], 2, 2, free) == [5, 2]


def test_drafts_nothing_where_a_token_costs_as_much_as_a_step() -> None:
    assert Controller().decide([Candidate("a", 5, 3), Candidate("b", 2, 1)], 2, 2, dear) == [0, 0]


def test_a_row_that_fails_is_left_alone_and_one_that_succeeds_is_not() -> None:
    controller = taught("good", 3, 4, 4)
    for _ in range(50):
        controller.observe("bad", 1, 4, 0)
    lengths = controller.decide([Candidate("good", 6, 3), Candidate("bad", 6, 1)], 2, 2, lambda n: 1 + 0.1 * n)
    assert lengths == [6, 0]


def test_a_step_up_in_the_cost_is_taken_whole_or_not_at_all() -> None:
    """Time as a staircase: up to 8 tokens cost one tile, 9 to 16 two; a sure draft of 12 is worth the second tile."""
    sure = taught("a", 5, 8, 8)
    assert sure.decide([Candidate("a", 12, 5)], 1, 1, lambda n: 1.0 if n <= 8 else 1.2) == [12]
    assert sure.decide([Candidate("a", 12, 5)], 1, 1, lambda n: 1.0 if n <= 8 else 3.0) == [7]


def test_a_probe_drafts_one_token_at_any_price() -> None:
    assert Controller().decide([Candidate("a", 5, 3, must_probe=True), Candidate("b", 5, 3)], 2, 2, dear) == [1, 0]
    assert Controller().decide([Candidate("a", 0, 0, must_probe=True)], 1, 1, dear) == [0]


def test_a_row_that_left_is_forgotten() -> None:
    controller = taught("a", 2, 4, 0)
    assert controller.chance("a", 2, 0) < controller.chance("new", 2, 0) + 1e-9
    controller.forget("a")
    assert not controller.rows


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1.0), min_size=60, max_size=60),
)
def test_never_expects_less_than_plain(proposals: list[tuple[int, int]], increments: list[float]) -> None:
    times = [sum(increments[: n + 1]) for n in range(60)]
    candidates = [Candidate(str(i), length, match) for i, (length, match) in enumerate(proposals)]
    controller = Controller()
    lengths = controller.decide(candidates, len(candidates), len(candidates), lambda n: times[n])
    assert all(0 <= n <= c.length for n, c in zip(lengths, candidates, strict=True))
    expected = len(candidates) + sum(controller._reach(c, n)[0] for c, n in zip(candidates, lengths, strict=True))
    rows = len(candidates)
    assert expected / times[rows + sum(lengths)] >= rows / times[rows] - 1e-9
