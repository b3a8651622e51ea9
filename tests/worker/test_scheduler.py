"""Admission, preemption and prompt chunks."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.priority import Priority
from common.sampling import Sampling
from worker import scheduler
from worker.request import Request, Row
from worker.scheduler import Limits, Shape
from worker.waiting import Waiting


def request(tokens: int, made: int = 1) -> Request:
    return Request(request_id=f"r{tokens}", prompt=tuple(range(tokens)), sampling=Sampling(), max_tokens=made)


def waiting(requests: Iterable[Request]) -> list[Waiting]:
    return [Waiting(one, number, 0.0) for number, one in enumerate(requests)]


def limits(rows: int = 4, kv_bytes: int | None = None, headroom_tokens: int = 256) -> Limits:
    return Limits(rows=rows, waiting=10, kv_bytes=kv_bytes, kv_bytes_per_token=1, headroom_tokens=headroom_tokens)


def row(tokens: int, slot: int = 0, made: int = 1, **changes: object) -> Row:
    new = Row.of(request(tokens, made), slot, 0.0)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def test_admits_in_order_up_to_the_rows() -> None:
    queue = waiting(request(n) for n in (5, 6, 7))
    assert scheduler.admissible(queue, [], limits(rows=2)) == queue[:2]
    assert scheduler.admissible(queue, [row(3)], limits(rows=2)) == queue[:1]
    assert scheduler.admissible(queue, [row(3)], limits(rows=1)) == []


def test_a_long_request_waits_until_the_cache_has_room_and_none_overtakes_it() -> None:
    queue = waiting([request(2000), request(5)])
    assert scheduler.admissible(queue, [row(100)], limits(kv_bytes=3000)) == []
    assert scheduler.admissible(queue, [], limits(kv_bytes=3000)) == queue[:1]


@pytest.mark.parametrize(("headroom_tokens", "admitted"), [(1, 3), (200, 3), (300, 1), (5000, 1)])
def test_counts_what_rows_need_soon_not_what_they_may_come_to_need(headroom_tokens: int, admitted: int) -> None:
    """Three rows of 256 tokens fit, or one of 512."""
    queue = waiting(request(10, made=1000) for _ in range(4))
    assert len(scheduler.admissible(queue, [], limits(9, 800, headroom_tokens))) == admitted


def test_a_request_soon_at_its_end_needs_no_headroom() -> None:
    queue = waiting(request(200, made=50) for _ in range(3))
    assert len(scheduler.admissible(queue, [], limits(kv_bytes=768, headroom_tokens=1000))) == 3


def test_what_can_never_fit_is_known_at_once() -> None:
    assert not scheduler.fits_alone(request(2000), limits(kv_bytes=1000))
    assert scheduler.fits_alone(request(200), limits(kv_bytes=1000))
    assert scheduler.fits_alone(request(2000), limits())


def test_states_of_rows_take_their_part_of_the_memory() -> None:
    some = Limits(rows=9, waiting=9, kv_bytes=2000, kv_bytes_per_token=1, kv_bytes_per_row=400)
    assert some.pool_bytes(3, 256) == 1968
    assert len(scheduler.admissible(waiting(request(9) for _ in range(9)), [], some)) == 3


def test_slots_move_together_only_when_the_memory_asks_for_it() -> None:
    rows = [row(100, slot, made=1000) for slot in (0, 3, 5)]
    has = Shape(8, 256)
    assert scheduler.shape_to_move_to(rows, has, has, limits(kv_bytes=2048)) is None
    assert scheduler.shape_to_move_to(rows, has, has, limits(kv_bytes=2047)) == Shape(3, 256)
    assert scheduler.shape_to_move_to(rows, has, Shape(8, 512), limits()) is None


def test_slots_that_hardly_anybody_uses_are_given_back() -> None:
    rows = [row(100, 0, made=50)]
    has = Shape(8, 1024)
    assert scheduler.shape_to_move_to(rows, has, has, limits(kv_bytes=10_000)) == Shape(1, 256)
    assert scheduler.shape_to_move_to(rows, has, has, limits(kv_bytes=100_000)) is None  # nobody misses it
    assert scheduler.shape_to_move_to(rows * 8, has, has, limits(kv_bytes=10_000)) is None


def test_the_lowest_class_gives_way_and_in_it_the_youngest() -> None:
    high = Request("high", (1,), Sampling(), 9, priority=Priority.HIGH)
    rows = [row(5, 0, number=1), row(6, 1, number=3), row(7, 2, number=2), Row.of(high, 3, 0.0)]
    rows[3].number = 4
    assert scheduler.victim(rows, 0.0, 30.0) is rows[1]
    assert scheduler.victim(rows[3:] + rows[:1], 29.0, 30.0) is rows[0]
    assert scheduler.victim(rows[3:] + rows[:1], 31.0, 30.0) is rows[3]  # the other has risen, and is older


@given(st.sets(st.integers(0, 12)), st.integers(0, 6))
def test_free_slots_are_the_lowest_that_nobody_has(taken: set[int], count: int) -> None:
    rows = [Row.of(request(1), slot, 0.0) for slot in taken]
    slots = scheduler.free_slots(rows, count)
    assert slots == [slot for slot in range(20) if slot not in taken][:count]


def test_prompts_share_a_chunk_in_order_of_admission() -> None:
    rows = [Row.of(request(30), 0, 2.0), Row.of(request(10), 1, 1.0), Row.of(request(5), 2, 3.0)]
    assert scheduler.share_prefill(rows, 25) == {1: 10, 0: 15}
    assert scheduler.share_prefill(rows, 100) == {1: 10, 0: 30, 2: 5}


def test_the_shortest_of_prompts_that_came_together_is_fed_first() -> None:
    rows = [Row.of(request(tokens), slot, 1.0) for slot, tokens in enumerate((30, 10, 20))]
    assert scheduler.share_prefill(rows, 25) == {1: 10, 2: 15}
