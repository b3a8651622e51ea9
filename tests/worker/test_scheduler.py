"""Admission and prompt chunks."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from common.sampling import Sampling
from worker import scheduler
from worker.request import Request, Row
from worker.scheduler import Limits


def request(tokens: int, made: int = 1) -> Request:
    return Request(request_id=f"r{tokens}", prompt=tuple(range(tokens)), sampling=Sampling(), max_tokens=made)


def limits(rows: int = 4, kv_bytes: int | None = None) -> Limits:
    return Limits(rows=rows, waiting=10, kv_bytes=kv_bytes, kv_bytes_per_token=1)


def test_admits_in_order_up_to_the_rows() -> None:
    waiting = deque(request(n) for n in (5, 6, 7))
    assert scheduler.admissible(waiting, [], limits(rows=2)) == 2
    assert scheduler.admissible(waiting, [Row.of(request(3), 0, 0.0)], limits(rows=2)) == 1


def test_a_long_request_waits_until_the_cache_has_room_and_none_overtakes_it() -> None:
    running = [Row.of(request(100), 0, 0.0)]
    waiting = deque([request(2000), request(5)])
    assert scheduler.admissible(waiting, running, limits(kv_bytes=3000)) == 0
    assert scheduler.admissible(waiting, [], limits(kv_bytes=3000)) == 1


def test_what_can_never_fit_is_known_at_once() -> None:
    assert not scheduler.fits_alone(request(2000), limits(kv_bytes=1000))
    assert scheduler.fits_alone(request(200), limits(kv_bytes=1000))


@given(st.sets(st.integers(0, 12)), st.integers(0, 6))
def test_free_slots_are_the_lowest_that_nobody_has(taken: set[int], count: int) -> None:
    rows = [Row.of(request(1), slot, 0.0) for slot in taken]
    slots = scheduler.free_slots(rows, count)
    assert slots == [slot for slot in range(20) if slot not in taken][:count]


def test_prompts_share_a_chunk_in_order_of_admission() -> None:
    rows = [Row.of(request(30), 0, 2.0), Row.of(request(10), 1, 1.0), Row.of(request(5), 2, 3.0)]
    assert scheduler.share_prefill(rows, 25) == {1: 10, 0: 15}
    assert scheduler.share_prefill(rows, 100) == {1: 10, 0: 30, 2: 5}
