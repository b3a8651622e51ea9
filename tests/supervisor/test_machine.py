"""The worker state machine: a toy life, then a table, then random lives."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.config import SupervisorConfig
from common.states import Death, ExitCode, WorkerState
from router.supervisor import machine as m
from router.supervisor.machine import Action, Failure, Machine

LIMITS = SupervisorConfig()
S = WorkerState


def play(*events: m.Event, machine: Machine | None = None, now: float = 0.0) -> tuple[Machine, list[Action]]:
    """The machine after all `events` at the time `now`, and the actions of the last one."""
    machine = machine or Machine()
    actions: tuple[Action, ...] = ()
    for event in events:
        machine, actions = m.step(machine, event, now, 0.0, LIMITS)
    return machine, list(actions)


def in_state(state: WorkerState) -> Machine:
    """A machine that got to `state` by events."""
    ways: dict[WorkerState, tuple[m.Event, ...]] = {
        S.STOPPED: (),
        S.STARTING: (m.Start(),),
        S.LOADING: (m.Start(), m.Hello()),
        S.READY: (m.Start(), m.Hello(), m.Ready()),
        S.DRAINING: (m.Start(), m.Hello(), m.Ready(), m.DrainAsked()),
        S.STOPPING: (m.Start(), m.Hello(), m.Ready(), m.ExitAsked()),
        S.BACKOFF: (m.Start(), m.Exited(1)),
        S.FAILED: (m.Start(), m.Hello(), m.Exited(ExitCode.BAD_MODEL, "no config")),
    }
    machine, _ = play(*ways[state])
    assert machine.state is state
    return machine


def test_toy_life() -> None:
    machine, actions = play(m.Start())
    assert (machine.state, actions, machine.generation) == (S.STARTING, [Action.SPAWN], 1)
    machine, _ = play(m.Hello(), m.Ready(), machine=machine)
    assert machine.state is S.READY
    machine, actions = play(m.DrainAsked(), machine=machine)
    assert (machine.state, actions) == (S.DRAINING, [Action.SEND_DRAIN])
    machine, actions = play(m.Exited(0), machine=machine)
    assert (machine.state, actions, machine.deadline) == (S.STOPPED, [], None)


ALL = set(WorkerState)
REACTIONS: list[tuple[m.Event, dict[WorkerState, tuple[WorkerState, list[Action]]]]] = [
    (m.Start(), {S.STOPPED: (S.STARTING, [Action.SPAWN]), S.BACKOFF: (S.STARTING, [Action.SPAWN])}),
    (m.Hello(), {S.STARTING: (S.LOADING, [])}),
    (m.Mismatch("old"), {S.STARTING: (S.STARTING, [Action.KILL])}),
    (m.Ready(), {S.LOADING: (S.READY, [])}),
    (m.DrainSeen(), {S.READY: (S.DRAINING, [])}),
    (
        m.DrainAsked(),
        {
            S.STARTING: (S.STOPPING, [Action.SEND_EXIT]),
            S.LOADING: (S.STOPPING, [Action.SEND_EXIT]),
            S.READY: (S.DRAINING, [Action.SEND_DRAIN]),
            S.BACKOFF: (S.STOPPED, []),
            S.FAILED: (S.STOPPED, []),
        },
    ),
    (
        m.ExitAsked(),
        {
            S.STARTING: (S.STOPPING, [Action.SEND_EXIT]),
            S.LOADING: (S.STOPPING, [Action.SEND_EXIT]),
            S.READY: (S.STOPPING, [Action.SEND_EXIT]),
            S.DRAINING: (S.STOPPING, [Action.SEND_EXIT]),
            S.BACKOFF: (S.STOPPED, []),
            S.FAILED: (S.STOPPED, []),
        },
    ),
    (
        m.Exited(-9, "killed"),
        {
            S.STARTING: (S.BACKOFF, []),
            S.LOADING: (S.BACKOFF, []),
            S.READY: (S.BACKOFF, []),
            S.DRAINING: (S.STOPPED, []),
            S.STOPPING: (S.STOPPED, []),
        },
    ),
    (
        m.Exited(ExitCode.OUT_OF_MEMORY, "no memory"),
        {
            S.STARTING: (S.FAILED, []),
            S.LOADING: (S.FAILED, []),
            S.READY: (S.FAILED, []),
            S.DRAINING: (S.STOPPED, []),
            S.STOPPING: (S.STOPPED, []),
        },
    ),
    (m.Rejected("too large"), {S.STOPPED: (S.FAILED, [])}),
    (m.Forget(), {S.BACKOFF: (S.STOPPED, []), S.FAILED: (S.STOPPED, [])}),
]
TABLE = [(state, event, *reactions.get(state, (state, []))) for event, reactions in REACTIONS for state in WorkerState]


@pytest.mark.parametrize(
    ("before", "event", "after", "actions"), TABLE, ids=[f"{b}-{type(e).__name__}" for b, e, *_ in TABLE]
)
def test_reaction(before: WorkerState, event: m.Event, after: WorkerState, actions: list[Action]) -> None:
    machine, done = play(event, machine=in_state(before))
    assert (machine.state, done) == (after, actions)


@pytest.mark.parametrize("state", [S.STOPPED, S.LOADING, S.READY, S.BACKOFF, S.FAILED])
def test_time_alone_changes_nothing(state: WorkerState) -> None:
    machine = in_state(state)
    assert play(m.Elapsed(), machine=machine, now=1e9) == (machine, [])


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (ExitCode.BAD_MODEL, Failure.BAD_MODEL),
        (ExitCode.OUT_OF_MEMORY, Failure.OUT_OF_MEMORY),
        (ExitCode.BAD_PROTOCOL, Failure.BAD_PROTOCOL),
    ],
)
def test_exit_code_that_no_retry_cures_fails_with_its_detail(code: int, failure: Failure) -> None:
    machine, _ = play(m.Exited(code, "because"), machine=in_state(S.LOADING))
    assert (machine.state, machine.failure, machine.detail) == (S.FAILED, failure, "because")
    assert play(m.Start(), machine=machine)[0] == machine
    retried, actions = play(m.Forget(), m.Start(), machine=machine)
    assert (retried.state, retried.failure, actions) == (S.STARTING, None, [Action.SPAWN])


def test_clean_exit_that_nobody_asked_for_is_a_crash() -> None:
    assert play(m.Exited(0), machine=in_state(S.READY))[0].state is S.BACKOFF


def test_worker_that_says_no_hello_is_killed_and_counted_as_a_crash() -> None:
    starting = in_state(S.STARTING)
    assert play(m.Elapsed(), machine=starting, now=LIMITS.start_timeout_s - 1) == (starting, [])
    machine, actions = play(m.Elapsed(), machine=starting, now=LIMITS.start_timeout_s)
    assert (machine.state, actions) == (S.STARTING, [Action.KILL])
    machine, _ = play(m.Exited(-9, "was killed"), machine=machine)
    assert (machine.state, machine.crashes) == (S.BACKOFF, 1)
    assert "no hello within 60 s" in machine.detail


def test_worker_of_another_protocol_fails_when_it_is_gone() -> None:
    machine, _ = play(m.Mismatch("speaks 2"), m.Hello(), m.Exited(-9, "was killed"), machine=in_state(S.STARTING))
    assert (machine.state, machine.failure, machine.detail) == (S.FAILED, Failure.BAD_PROTOCOL, "speaks 2")


def test_drain_that_takes_too_long_becomes_an_exit_then_a_kill() -> None:
    machine, actions = play(m.Elapsed(), machine=in_state(S.DRAINING), now=LIMITS.drain_timeout_s)
    assert (machine.state, actions) == (S.STOPPING, [Action.SEND_EXIT])
    machine, actions = play(m.Elapsed(), machine=machine, now=LIMITS.drain_timeout_s + LIMITS.stop_timeout_s)
    assert (machine.state, actions) == (S.STOPPING, [Action.KILL])
    assert play(m.Elapsed(), machine=machine, now=1e9) == (machine, [])


def test_three_restarts_at_once_then_doubling_delays_up_to_the_limit() -> None:
    delays = [m.restart_delay(crashes, LIMITS, random=0.0) for crashes in range(1, 12)]
    assert delays == [0, 0, 0, 1, 2, 4, 8, 16, 32, 48, 48]
    longest = [m.restart_delay(crashes, LIMITS, random=1.0) for crashes in range(1, 12)]
    assert longest == [0, 0, 0, 1.25, 2.5, 5, 10, 20, 40, 60, 60]


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0.01, 100), st.floats(0.01, 1000), st.integers(1, 5))
def test_delay_lies_between_its_limits(crashes: int, r: float, first: float, most: float, at_once: int) -> None:
    limits = SupervisorConfig(backoff_first_s=first, backoff_max_s=most, immediate_restarts=at_once)
    delay = m.restart_delay(crashes, limits, r)
    assert delay == 0.0 if crashes <= at_once else min(first, most) <= delay <= most


def test_back_off_is_waited_for() -> None:
    machine, now = Machine(), 0.0
    for _ in range(4):
        machine, _ = play(m.Start(), m.Exited(1, "boom"), machine=machine, now=now)
    assert (machine.state, machine.crashes, machine.restarts, machine.deadline) == (S.BACKOFF, 4, 3, 1.0)
    assert play(m.Start(), machine=machine, now=0.9) == (machine, [])
    assert play(m.Start(), machine=machine, now=1.0)[1] == [Action.SPAWN]
    assert machine.detail == "boom"


@pytest.mark.parametrize(
    ("events", "death"),
    [
        ((m.Start(), m.Hello(), m.Exited(1)), Death.CRASHED),
        ((m.Start(), m.Hello(), m.Ready(), m.Exited(-9)), Death.KILLED),
        ((m.Start(), m.Hello(), m.Ready(), m.Hung("still"), m.Exited(-6)), Death.HUNG),
        ((m.Start(), m.Elapsed(), m.Exited(-9)), Death.SILENT),
    ],
)
def test_death_has_a_reason(events: tuple[m.Event, ...], death: Death) -> None:
    machine = Machine()
    for now, event in enumerate(events):
        machine, _ = play(event, machine=machine, now=now * LIMITS.start_timeout_s)
    assert (machine.state, machine.death) == (S.BACKOFF, death)


def test_stable_time_forgives_earlier_crashes() -> None:
    machine = Machine()
    for _ in range(5):
        machine, _ = play(m.Start(), m.Hello(), m.Ready(), m.Exited(-6), machine=machine, now=machine.deadline or 0)
    assert machine.crashes == 5
    since = machine.deadline or 0.0
    machine, _ = play(m.Start(), m.Hello(), m.Ready(), machine=machine, now=since)
    machine, _ = play(m.Exited(-6), machine=machine, now=since + LIMITS.stable_after_s)
    assert (machine.crashes, machine.deadline) == (1, since + LIMITS.stable_after_s)


def test_illegal_edge_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="illegal edge"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "LEGAL_EDGES", frozenset())
        play(m.Start())


def test_hung_worker_is_told_to_say_where_it_stands_then_killed_and_counts_as_crashed() -> None:
    machine, actions = play(m.Hung("hung: in a step"), machine=in_state(S.READY))
    assert (machine.state, actions, machine.deadline) == (S.READY, [Action.ABORT], m.ABORT_GRACE_S)
    assert play(m.Hung("again"), machine=machine) == (machine, [])
    machine, actions = play(m.Elapsed(), machine=machine, now=m.ABORT_GRACE_S)
    assert actions == [Action.KILL]
    machine, _ = play(m.Exited(-9, "was killed by SIGKILL"), machine=machine)
    assert (machine.state, machine.detail, machine.crashes) == (S.BACKOFF, "hung: in a step", 1)
    machine, _ = play(m.Start(), m.Hello(), m.Ready(), machine=machine)
    assert not machine.is_hung


class RandomLife(RuleBasedStateMachine):
    """Any events in any order: only legal edges (asserted by `step`), and the promises below."""

    @initialize()
    def begin(self) -> None:
        self.machine = Machine()
        self.now = 0.0
        self.processes = 0
        self.was_told = False

    def _step(self, event: m.Event, random: float = 0.5) -> None:
        before = self.machine
        self.machine, actions = m.step(before, event, self.now, random, LIMITS)
        self.processes += Action.SPAWN in actions
        if Action.SPAWN in actions:
            assert self.machine.generation == before.generation + 1
            assert not m.has_process(before.state)

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        event=st.sampled_from(
            [
                m.Start(),
                m.Hello(),
                m.Mismatch("x"),
                m.Ready(),
                m.Hung("x"),
                m.DrainSeen(),
                m.DrainAsked(),
                m.ExitAsked(),
                m.Elapsed(),
                m.Rejected("x"),
                m.Forget(),
            ]
        ),
        random=st.floats(0, 1, exclude_max=True),
    )
    def happen(self, event: m.Event, random: float) -> None:
        self._step(event, random)

    @precondition(lambda self: self.processes > 0)
    @rule(code=st.sampled_from([0, 1, 3, 4, 5, -6, -9]))
    def exit(self, code: int) -> None:
        self.processes -= 1
        self._step(m.Exited(code, "gone"))

    @invariant()
    def process_exists_exactly_in_its_states(self) -> None:
        assert self.processes == m.has_process(self.machine.state)

    @invariant()
    def failure_is_known_exactly_when_failed(self) -> None:
        assert (self.machine.failure is not None) == (self.machine.state is S.FAILED)

    @invariant()
    def what_is_told_to_go_has_a_deadline_or_was_killed(self) -> None:
        if self.machine.state is S.DRAINING:
            assert self.machine.deadline is not None

    @invariant()
    def back_off_ends(self) -> None:
        if self.machine.state is S.BACKOFF:
            assert self.machine.deadline is not None
            assert self.machine.deadline - self.machine.since <= LIMITS.backoff_max_s
            assert m.may_start(self.machine, math.inf)


TestRandomLife = RandomLife.TestCase
