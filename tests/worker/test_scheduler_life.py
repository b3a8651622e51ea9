"""A batch without a model: requests come, grow, are cancelled and preempted in any order, and none is lost."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.priority import Priority
from common.sampling import Sampling
from worker import scheduler
from worker.request import Request, Row
from worker.scheduler import STEP_TOKENS, Limits, Shape
from worker.waiting import WaitingList

AGING_S = 30.0


class RandomBatch(RuleBasedStateMachine):
    """The engine's admission and preemption around the pure decisions."""

    @initialize(rows=st.integers(1, 6), kv_bytes=st.sampled_from([600, 1500, 4000]))
    def begin(self, rows: int, kv_bytes: int) -> None:
        self.limits = Limits(rows=rows, waiting=99, kv_bytes=kv_bytes, kv_bytes_per_token=1, headroom_tokens=100)
        self.waiting = WaitingList(AGING_S)
        self.rows: list[Row] = []
        self.live: set[str] = set()
        self.arrived = 0
        self.now = 0.0

    @rule(tokens=st.integers(1, 600), made=st.integers(1, 300), priority=st.sampled_from(list(Priority)))
    def arrive(self, tokens: int, made: int, priority: Priority) -> None:
        self.arrived += 1
        request = Request(f"r{self.arrived}", tuple(range(tokens)), Sampling(), made, priority=priority)
        if scheduler.fits_alone(request, self.limits):
            self.waiting.add(request, self.now)
            self.live.add(request.request_id)

    @rule(gained=st.integers(1, 9), seconds=st.sampled_from([0.1, 1.0, 31.0]))
    def step(self, gained: int, seconds: float) -> None:
        self.now += seconds
        self._admit()
        self._shed()
        for row in list(self.rows):
            row.tokens += [0] * min(gained, row.tokens_left)
            row.cached = len(row.tokens) - 1
            if row.tokens_left <= 0:
                self._leave(row)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        for one in [one for one in self.waiting if one.request.request_id == name]:
            self.waiting.remove(one)
            self.live.remove(name)
        for row in [row for row in self.rows if row.id == name]:
            self._leave(row)

    @rule(kv_bytes=st.sampled_from([300, 900, 5000]))
    def limit(self, kv_bytes: int) -> None:
        self.limits = replace(self.limits, kv_bytes=kv_bytes)

    def _admit(self) -> None:
        queue = list(self.waiting.in_order(self.now))
        admitted = scheduler.admissible(queue, self.rows, self.limits)
        assert admitted == queue[: len(admitted)], "nobody overtakes"
        assert admitted or self.rows or not queue, "an empty batch takes whoever is first"
        for one, slot in zip(admitted, scheduler.free_slots(self.rows, len(admitted)), strict=True):
            self.waiting.remove(one)
            self.rows.append(one.as_row(slot, self.now))
        self.rows.sort(key=lambda row: row.slot)
        if len(self.rows) > 1 and admitted:
            soon = scheduler.capacity_for(self.rows, self.limits.headroom_tokens)
            assert self.limits.fit(len(self.rows), soon), "admitted what does not fit"

    def _shed(self) -> None:
        while len(self.rows) > 1:
            needed = Shape(len(self.rows), scheduler.capacity_for(self.rows, STEP_TOKENS))
            if self.limits.fit(needed.slots, needed.capacity_tokens):
                return
            row = scheduler.victim(self.rows, self.now, AGING_S)
            lowest = min(other.request.priority for other in self.rows)
            is_fresh = all(self.now - other.since_s < AGING_S for other in self.rows)
            assert not is_fresh or row.request.priority == lowest
            self.rows.remove(row)
            row.lose_slot(self.now)
            self.waiting.put_back(row)

    def _leave(self, row: Row) -> None:
        self.rows.remove(row)
        self.live.remove(row.id)

    @invariant()
    def every_live_request_waits_or_has_a_row(self) -> None:
        waiting = [one.request.request_id for one in self.waiting]
        running = [row.id for row in self.rows]
        assert sorted(waiting + running) == sorted(self.live)

    @invariant()
    def slots_are_as_many_as_rows_and_no_more_than_allowed(self) -> None:
        assert len({row.slot for row in self.rows}) == len(self.rows) <= self.limits.rows

    @invariant()
    def those_of_one_class_wait_in_the_order_of_their_arrival(self) -> None:
        order = list(self.waiting.in_order(self.now))
        for priority in Priority:
            numbers = [one.number for one in order if one.request.priority == priority]
            assert numbers == sorted(numbers)


RandomBatch.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRandomBatch = RandomBatch.TestCase
