"""The life of one model's worker as a pure state machine: events in, new state and actions out.

It knows no clock, no process and no socket: the time and one random number in [0, 1) are arguments. After
supervisord's `process.py` and gunicorn's arbiter, but it never gives up on a crash that may pass.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from common.config import SupervisorConfig
from common.states import LEGAL_EDGES, Death, ExitCode, WorkerState

ABORT_GRACE_S = 2.0  # for writing down where all threads stand
JITTER = 0.25  # a delay is up to this much longer, so that workers which died together do not return together


class Failure(Enum):
    """Why a worker is FAILED, and hence what has to change before it may be tried again."""

    BAD_MODEL = auto()
    OUT_OF_MEMORY = auto()
    BAD_PROTOCOL = auto()


class Action(Enum):
    """What the supervisor has to do after a step."""

    SPAWN = auto()
    SEND_DRAIN = auto()
    SEND_EXIT = auto()
    ABORT = auto()  # have it say where it stands, then die
    KILL = auto()


@dataclass(frozen=True, slots=True)
class Machine:
    """Where one worker stands. `deadline` is when `Elapsed` is due (in BACKOFF: when it may start again)."""

    state: WorkerState = WorkerState.STOPPED
    generation: int = 0
    since: float = 0.0
    deadline: float | None = None
    crashes: int = 0  # in a row, without a stable time in between
    restarts: int = 0
    death: Death | None = None  # the latest
    failure: Failure | None = None
    verdict: Failure | None = None  # decided already, takes effect when the process is gone
    is_hung: bool = False  # told to die for standing still; `detail` says how
    detail: str = ""


# --- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """There is room for it and somebody wants it (in BACKOFF: and the delay is over)."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The new process has connected and shown its token."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The new process speaks another version of the protocol."""

    detail: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded its model."""


@dataclass(frozen=True, slots=True)
class Hung:
    """The worker loads or serves, but has stood still for too long."""

    detail: str


@dataclass(frozen=True, slots=True)
class DrainSeen:
    """The worker drains without having been asked (somebody sent it SIGTERM)."""


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Unload or evict: finish what runs, then go."""


@dataclass(frozen=True, slots=True)
class ExitAsked:
    """Go now."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The process was reaped. `code` is negative for a signal, as in `subprocess`."""

    code: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Elapsed:
    """The machine's deadline has passed."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """It can never fit into the memory budget."""

    detail: str


@dataclass(frozen=True, slots=True)
class Forget:
    """BACKOFF: nobody wants it any more. FAILED: something changed, it may be tried again."""


Event = (
    Start | Hello | Mismatch | Ready | Hung | DrainSeen | DrainAsked | ExitAsked | Exited | Elapsed | Rejected | Forget
)
Step = tuple[Machine, tuple[Action, ...]]

_FAILURES = {
    ExitCode.BAD_MODEL: Failure.BAD_MODEL,
    ExitCode.OUT_OF_MEMORY: Failure.OUT_OF_MEMORY,
    ExitCode.BAD_PROTOCOL: Failure.BAD_PROTOCOL,
}
_STARTABLE = (WorkerState.STOPPED, WorkerState.BACKOFF)
_ALIVE_UNASKED = (WorkerState.STARTING, WorkerState.LOADING, WorkerState.READY)
_LEAVING = (WorkerState.DRAINING, WorkerState.STOPPING)


def has_process(state: WorkerState) -> bool:
    """Whether a process exists, or is being made, in this state."""
    return state in _ALIVE_UNASKED or state in _LEAVING


def is_leaving(state: WorkerState) -> bool:
    """Whether the process is on its way out, so that its memory comes back by itself."""
    return state in _LEAVING


def may_start(machine: Machine, now: float) -> bool:
    """Whether `Start` would be heard now: stopped, or backed off for long enough."""
    if machine.state is WorkerState.BACKOFF:
        return machine.deadline is None or now >= machine.deadline
    return machine.state is WorkerState.STOPPED


def is_overdue(machine: Machine, now: float) -> bool:
    """Whether `Elapsed` is due. A BACKOFF ends by `Start` or `Forget` instead."""
    return has_process(machine.state) and machine.deadline is not None and now >= machine.deadline


def restart_delay(crashes: int, limits: SupervisorConfig, random: float) -> float:
    """Seconds to wait after the n-th crash in a row: none at first, then doubling with jitter."""
    doublings = crashes - limits.immediate_restarts - 1
    if doublings < 0:
        return 0.0
    delay = min(limits.backoff_first_s * 2.0 ** min(doublings, 62), limits.backoff_max_s / (1 + JITTER))
    return min(max(delay, limits.backoff_first_s) * (1 + JITTER * random), limits.backoff_max_s)


def step(machine: Machine, event: Event, now: float, random: float, limits: SupervisorConfig) -> Step:
    """The state after `event`, and what to do. An event that means nothing in this state changes nothing."""
    after, actions = _react(machine, event, now, random, limits)
    if after.state is not machine.state:
        edge = (machine.state, after.state)
        assert edge in LEGAL_EDGES, f"illegal edge {edge} on {event}"
    return after, actions


def _react(machine: Machine, event: Event, now: float, random: float, limits: SupervisorConfig) -> Step:
    state = machine.state
    match event:
        case Start() if may_start(machine, now):
            return _start(machine, now, limits)
        case Hello() if state is WorkerState.STARTING and machine.verdict is None:
            return _enter(machine, WorkerState.LOADING, now), ()
        case Mismatch(detail) if state is WorkerState.STARTING:
            return replace(machine, verdict=Failure.BAD_PROTOCOL, detail=detail), (Action.KILL,)
        case Ready() if state is WorkerState.LOADING:
            return _enter(machine, WorkerState.READY, now, detail=""), ()
        case Hung(detail) if state in (WorkerState.LOADING, WorkerState.READY) and not machine.is_hung:
            return replace(machine, is_hung=True, detail=detail, deadline=now + ABORT_GRACE_S), (Action.ABORT,)
        case DrainSeen() if state is WorkerState.READY:
            return _drain(machine, now, limits), ()
        case DrainAsked():
            return _leave(machine, now, limits, at_once=False)
        case ExitAsked():
            return _leave(machine, now, limits, at_once=True)
        case Exited(code, detail) if has_process(state):
            return _reaped(machine, code, detail, now, random, limits), ()
        case Elapsed() if is_overdue(machine, now):
            return _overdue(machine, now, limits)
        case Rejected(detail) if state is WorkerState.STOPPED:
            return _fail(machine, Failure.OUT_OF_MEMORY, detail, now), ()
        case Forget() if state in (WorkerState.BACKOFF, WorkerState.FAILED):
            return _stopped(machine, now), ()
    return machine, ()


def _enter(machine: Machine, state: WorkerState, now: float, **changes: object) -> Machine:
    return replace(machine, state=state, since=now, **({"deadline": None} | changes))  # type: ignore[arg-type]


def _start(machine: Machine, now: float, limits: SupervisorConfig) -> Step:
    is_restart = machine.state is WorkerState.BACKOFF
    started = _enter(
        machine,
        WorkerState.STARTING,
        now,
        deadline=now + limits.start_timeout_s,
        generation=machine.generation + 1,
        restarts=machine.restarts + is_restart,
        failure=None,
        verdict=None,
        is_hung=False,
        detail=machine.detail if is_restart else "",
    )
    return started, (Action.SPAWN,)


def _drain(machine: Machine, now: float, limits: SupervisorConfig) -> Machine:
    return _enter(machine, WorkerState.DRAINING, now, deadline=now + limits.drain_timeout_s)


def _leave(machine: Machine, now: float, limits: SupervisorConfig, *, at_once: bool) -> Step:
    if machine.state in (WorkerState.BACKOFF, WorkerState.FAILED):
        return _stopped(machine, now), ()
    if machine.state is WorkerState.READY and not at_once:
        return _drain(machine, now, limits), (Action.SEND_DRAIN,)
    if machine.state in _ALIVE_UNASKED or (machine.state is WorkerState.DRAINING and at_once):
        return _ask_exit(machine, now, limits)
    return machine, ()


def _ask_exit(machine: Machine, now: float, limits: SupervisorConfig) -> Step:
    stopping = _enter(machine, WorkerState.STOPPING, now, deadline=now + limits.stop_timeout_s)
    return stopping, (Action.SEND_EXIT,)


def _overdue(machine: Machine, now: float, limits: SupervisorConfig) -> Step:
    if machine.state is WorkerState.DRAINING:
        return _ask_exit(machine, now, limits)
    detail = machine.detail
    if machine.state is WorkerState.STARTING:
        detail = f"said no hello within {limits.start_timeout_s:g} s"
    return replace(machine, deadline=None, detail=detail), (Action.KILL,)


def _reaped(machine: Machine, code: int, detail: str, now: float, random: float, limits: SupervisorConfig) -> Machine:
    if is_leaving(machine.state):
        return _stopped(machine, now)
    if failure := machine.verdict or _FAILURES.get(code):
        return _fail(machine, failure, machine.detail if machine.verdict else detail, now)
    death = _death(machine, code)
    was_stable = machine.state is WorkerState.READY and now - machine.since >= limits.stable_after_s
    crashes = 1 if was_stable else machine.crashes + 1
    delay = restart_delay(crashes, limits, random)
    return _enter(
        machine,
        WorkerState.BACKOFF,
        now,
        deadline=now + delay,
        crashes=crashes,
        death=death,
        detail=machine.detail if death in (Death.HUNG, Death.SILENT) else detail,
    )


def _death(machine: Machine, code: int) -> Death:
    if machine.is_hung:
        return Death.HUNG
    if machine.state is WorkerState.STARTING and machine.deadline is None:
        return Death.SILENT
    return Death.KILLED if code < 0 else Death.CRASHED


def _fail(machine: Machine, failure: Failure, detail: str, now: float) -> Machine:
    return _enter(machine, WorkerState.FAILED, now, failure=failure, verdict=None, detail=detail)


def _stopped(machine: Machine, now: float) -> Machine:
    detail = machine.detail if machine.state is WorkerState.BACKOFF else ""
    return _enter(machine, WorkerState.STOPPED, now, crashes=0, failure=None, verdict=None, detail=detail)
