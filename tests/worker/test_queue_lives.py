"""Queue and scheduler through random lives, as the engine uses them, without a model.

Requests of all classes come, are cancelled, get rows, decode, end and are preempted, while the limit moves.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.priority import Priority
from common.sampling import Sampling
from worker import scheduler
from worker.cache.layout import CAPACITY_STEP, round_up
from worker.request import Request, Row
from worker.scheduler import STEP_TOKENS, Limits
from worker.waiting import WaitingList

ROWS = 4
AGING_S = 30.0
LONGEST_TOKENS = 600
LEAST_BYTES = round_up(LONGEST_TOKENS, CAPACITY_STEP)  # with a byte a token: what any request needs alone


class QueueLives(RuleBasedStateMachine):
    """What `Engine` does between steps, with rows that only count their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.arrived = 0
        self.live: set[str] = set()
        self.rows: list[Row] = []
        self.queue = WaitingList(AGING_S)
        self.limits = Limits(ROWS, 1000, 4 * LEAST_BYTES, 1, headroom_tokens=64)

    # --- requests come and go ---

    @rule(
        priority=st.sampled_from(Priority),
        prompt=st.integers(1, LONGEST_TOKENS // 2),
        made=st.integers(1, LONGEST_TOKENS // 2),
        count=st.integers(1, 6),
    )
    def submit(self, priority: Priority, prompt: int, made: int, count: int) -> None:
        for _ in range(count):
            self.arrived += 1
            name = str(self.arrived)
            request = Request(name, tuple(range(prompt)), Sampling(), made, priority=priority)
            assert scheduler.fits_alone(request, self.limits)
            self.queue.add(request, self.now_s)
            self.live.add(name)

    @rule(number=st.integers(0, 10))
    def cancel(self, number: int) -> None:
        """Whoever it is: waiting, running or preempted."""
        if self.live:
            name = sorted(self.live)[number % len(self.live)]
            for one in [w for w in self.queue if w.request.request_id == name]:
                self.queue.remove(one)
            self.rows = [row for row in self.rows if row.id != name]
            self.live.remove(name)

    # --- steps ---

    @rule(seconds=st.sampled_from([0.1, 5.0, 40.0]), tokens=st.integers(1, STEP_TOKENS))
    def step(self, seconds: float, tokens: int) -> None:
        """Admit, preempt what is too much, and let each row gain some tokens."""
        self._admit()
        self._shed()
        for row in list(self.rows):
            row.cached = len(row.tokens)
            row.tokens += [0] * min(tokens, row.tokens_left)
            if not row.tokens_left:
                self.rows.remove(row)
                self.live.remove(row.id)
        self.now_s += seconds

    @rule(part=st.integers(1, 4))
    def limit(self, part: int) -> None:
        """Another share of the memory, between two steps; one request alone always fits."""
        self.step(0.1, 1)
        self.limits = Limits(ROWS, 1000, part * LEAST_BYTES, 1, headroom_tokens=64)
        self.step(0.1, 1)

    def _admit(self) -> None:
        order = list(self.queue.in_order(self.now_s))
        admitted = scheduler.admissible(order, self.rows, self.limits)
        assert admitted == order[: len(admitted)], "somebody was overtaken"
        assert admitted or self.rows or not order, "nobody runs, and nobody is let in"
        for one, slot in zip(admitted, scheduler.free_slots(self.rows, len(admitted)), strict=True):
            self.queue.remove(one)
            self.rows.append(one.as_row(slot, self.now_s))
        self.rows.sort(key=lambda row: row.slot)
        if admitted and len(self.rows) > 1:
            assert self._needed(64) <= (self.limits.kv_bytes or 0), "more was let in than fits"

    def _shed(self) -> None:
        while len(self.rows) > 1 and self._needed(STEP_TOKENS) > (self.limits.kv_bytes or 0):
            victim = scheduler.victim(self.rows, self.now_s, AGING_S)
            assert not [r for r in self.rows if self._is_before(victim, r)], "a row gave way to a lesser one"
            self.rows.remove(victim)
            victim.lose_slot(self.now_s)
            self.queue.put_back(victim)

    def _needed(self, more_tokens: int) -> int:
        """Bytes of as many slots as rows, each long enough for the longest."""
        return len(self.rows) * round_up(max(row.soon_tokens(more_tokens) for row in self.rows), CAPACITY_STEP)

    def _is_before(self, one: Row, other: Row) -> bool:
        """Whether `one` has the better right to its slot: a higher class by now, or the same and older."""
        mine, its = self._class(one.request.priority, one.since_s), self._class(other.request.priority, other.since_s)
        return mine > its or (mine == its and one.number < other.number)

    def _class(self, priority: Priority, since_s: float) -> int:
        return min(int(priority) + int((self.now_s - since_s) / AGING_S), int(max(Priority)))

    # --- what must hold ---

    @invariant()
    def every_live_request_waits_or_has_one_slot(self) -> None:
        waiting = [one.request.request_id for one in self.queue]
        running = [row.id for row in self.rows]
        assert sorted(waiting + running) == sorted(self.live)
        assert len(self.queue) == len(waiting)
        slots = [row.slot for row in self.rows]
        assert len(set(slots)) == len(slots) <= ROWS

    @invariant()
    def the_order_is_by_class_then_by_arrival(self) -> None:
        order = list(self.queue.in_order(self.now_s))
        keys = [(-self._class(one.request.priority, one.since_s), one.number) for one in order]
        assert keys == sorted(keys)

    @invariant()
    def who_was_preempted_keeps_its_output(self) -> None:
        for one in self.queue:
            if one.row is not None:
                assert len(one.row.tokens) >= len(one.request.prompt)
                assert one.row.cached == 0 and one.row.preempted_s is not None

    def teardown(self) -> None:
        """Without new ones, all come to their end."""
        for _ in range(self.arrived * LONGEST_TOKENS):
            if not self.live:
                break
            self.step(1.0, STEP_TOKENS)
        assert not self.live


TestQueueLives = QueueLives.TestCase
TestQueueLives.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
