"""The queue: classes, age, and that nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from common.priority import Priority
from common.sampling import Sampling
from worker.request import Request
from worker.waiting import WaitingList

LOW, NORMAL, HIGH = Priority


def request(name: str, priority: Priority = NORMAL) -> Request:
    return Request(name, (1, 2), Sampling(), 5, priority=priority)


def names(queue: WaitingList, now_s: float) -> list[str]:
    return [one.request.request_id for one in queue.in_order(now_s)]


def test_higher_classes_come_first_and_within_one_who_came_first() -> None:
    queue = WaitingList()
    for name, priority in (("a", LOW), ("b", NORMAL), ("c", HIGH), ("d", NORMAL), ("e", HIGH), ("f", LOW)):
        queue.add(request(name, priority), 0.0)
    assert names(queue, 1.0) == ["c", "e", "b", "d", "a", "f"]
    assert len(queue) == 6 and {one.request.request_id for one in queue} == set("abcdef")


def test_who_waits_rises_a_class_at_a_time() -> None:
    queue = WaitingList(aging_s=10.0)
    queue.add(request("low", LOW), 0.0)
    queue.add(request("normal", NORMAL), 9.0)
    queue.add(request("high", HIGH), 9.0)
    assert names(queue, 9.9) == ["high", "normal", "low"]
    assert names(queue, 10.0) == ["high", "low", "normal"]
    assert names(queue, 19.0) == ["normal", "high", "low"]
    assert names(queue, 20.0) == ["low", "normal", "high"]
    assert names(queue, 1000.0) == ["low", "normal", "high"]


def test_a_preempted_row_comes_before_its_class() -> None:
    queue = WaitingList()
    for name in "abc":
        queue.add(request(name), 0.0)
    queue.add(request("h", HIGH), 0.0)
    _, first, second, _ = queue.in_order(1.0)
    rows = [one.as_row(slot, 1.0) for slot, one in enumerate((first, second))]
    for one in (first, second):
        queue.remove(one)
    for row in rows[::-1]:
        row.lose_slot(2.0)
        queue.put_back(row)
    assert names(queue, 3.0) == ["h", "a", "b", "c"]
    again = list(queue.in_order(3.0))[1]
    assert again.as_row(7, 5.0) is rows[0]
    assert (rows[0].slot, rows[0].admitted_s) == (7, 4.0)


arrivals = st.lists(st.tuples(st.sampled_from(list(Priority)), st.floats(0.0, 8.0)), min_size=1, max_size=40)


@given(arrivals, st.floats(0.5, 100.0), st.integers(1, 3))
def test_within_a_class_nobody_overtakes(arriving: list[tuple[Priority, float]], aging_s: float, rows: int) -> None:
    queue, now_s, served = WaitingList(aging_s), 0.0, []
    for number, (priority, pause_s) in enumerate(arriving):
        now_s += pause_s
        queue.add(request(str(number), priority), now_s)
        if number % 3 == 2:
            for one in list(queue.in_order(now_s))[:rows]:
                queue.remove(one)
                served.append(one)
    served += queue.in_order(now_s)
    for priority in Priority:
        own = [one.number for one in served if one.request.priority is priority]
        assert own == sorted(own)
    assert sorted(int(one.request.request_id) for one in served) == list(range(len(arriving)))


@given(st.lists(st.sampled_from(list(Priority)), max_size=30), st.integers(1, 20))
def test_nobody_waits_for_ever_however_many_of_higher_classes_come(ahead: list[Priority], aging_s: int) -> None:
    """One request is served a second, and one of the highest class comes each second."""
    queue = WaitingList(float(aging_s))
    for number, priority in enumerate(ahead):
        queue.add(request(str(number), priority), 0.0)
    queue.add(request("low", LOW), 0.0)
    for now in range(1, 2 * aging_s + len(ahead) + 2 * aging_s + 2):
        queue.add(request(f"new{now}", HIGH), float(now))
        first = next(queue.in_order(float(now)))
        queue.remove(first)
        if first.request.request_id == "low":
            return
    raise AssertionError("it still waits")
