"""Looks for drafts are made as often as they are worth."""

from worker.drafters.looks import LARGEST_SHARE, MOST_SKIPPED, Looks


def share_looked(taken: float, saved: list[float], steps: int = 400) -> float:
    """Of the steps; each look saves the next of `saved`, in turns."""
    looks, count = Looks(), 0
    for _ in range(steps):
        if looks.is_due():
            looks.looked(taken, saved[count % len(saved)])
            count += 1
    return count / steps


def test_what_costs_nothing_is_done_in_every_step() -> None:
    assert share_looked(LARGEST_SHARE / 2, [0.0]) == 1.0


def test_looks_in_vain_take_their_share_of_the_time_at_most_and_never_end() -> None:
    for taken in (0.04, 0.1, 0.2):
        assert share_looked(taken, [0.0]) * taken < 1.5 * LARGEST_SHARE
    assert share_looked(5.0, [0.0]) > 0.9 / (MOST_SKIPPED + 1)


def test_looks_that_pay_on_average_are_made_even_if_most_do_not() -> None:
    assert share_looked(0.1, [1.0, 0.0, 0.0, 0.0]) > 0.99
    assert share_looked(0.1, [0.2, 0.0, 0.0, 0.0]) < 0.5


def test_a_single_long_look_is_forgotten() -> None:
    looks = Looks()
    looks.looked(30.0, 0.0)
    for _ in range(10):
        looks.looked(0.05, 0.2)
    assert looks.taken < looks.saved


def test_rows_searched_in_vain_are_searched_rarely_and_at_once_when_they_come_anew() -> None:
    looks, searched = Looks(), {"a": 0, "b": 0}
    for _ in range(100):
        found = looks.to_search(["a", "b"])
        for row in found:
            searched[row] += 1
        looks.searched(found & {"a"}, found - {"a"}, share=0.2)
    assert searched["a"] == 100 and 100 / (MOST_SKIPPED + 1) <= searched["b"] < 20
    looks.forget("b")
    assert looks.to_search(["b"]) == {"b"}
