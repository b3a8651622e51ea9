"""The states of a worker as everybody sees them, and the edges between them that are legal."""

from enum import StrEnum


class WorkerState(StrEnum):
    """Where a worker stands in its life; busy and idle are metrics, not states."""

    STOPPED = "stopped"
    STARTING = "starting"  # spawned, has not said hello
    LOADING = "loading"  # said hello, reads its weights
    READY = "ready"
    DRAINING = "draining"  # takes no new request, finishes the live ones
    STOPPING = "stopping"  # told to exit
    BACKOFF = "backoff"  # died, will be spawned again
    FAILED = "failed"  # will not be retried until something changes


class Death(StrEnum):
    """Why a worker ended that nobody had told to end."""

    CRASHED = "crashed"  # by an exit code
    KILLED = "killed"  # by a signal from outside, or of its own fault
    HUNG = "hung"
    SILENT = "silent"  # said no hello in time


LEGAL_EDGES: frozenset[tuple[WorkerState, WorkerState]] = frozenset(
    {
        (WorkerState.STOPPED, WorkerState.STARTING),
        (WorkerState.STOPPED, WorkerState.FAILED),  # refused before it was spawned: it can never fit
        (WorkerState.STARTING, WorkerState.LOADING),
        (WorkerState.STARTING, WorkerState.STOPPING),
        (WorkerState.STARTING, WorkerState.BACKOFF),
        (WorkerState.STARTING, WorkerState.FAILED),
        (WorkerState.LOADING, WorkerState.READY),
        (WorkerState.LOADING, WorkerState.STOPPING),
        (WorkerState.LOADING, WorkerState.BACKOFF),
        (WorkerState.LOADING, WorkerState.FAILED),
        (WorkerState.READY, WorkerState.DRAINING),
        (WorkerState.READY, WorkerState.STOPPING),
        (WorkerState.READY, WorkerState.BACKOFF),
        (WorkerState.READY, WorkerState.FAILED),
        (WorkerState.DRAINING, WorkerState.STOPPING),
        (WorkerState.DRAINING, WorkerState.STOPPED),
        (WorkerState.STOPPING, WorkerState.STOPPED),
        (WorkerState.BACKOFF, WorkerState.STARTING),
        (WorkerState.BACKOFF, WorkerState.STOPPED),
        (WorkerState.FAILED, WorkerState.STARTING),
        (WorkerState.FAILED, WorkerState.STOPPED),
    }
)


class ExitCode:
    """What a worker's exit status tells the supervisor."""

    OK = 0
    CRASH = 1  # anything unforeseen: restart with back-off
    BAD_MODEL = 3  # model or configuration cannot work: do not retry
    OUT_OF_MEMORY = 4  # do not retry until the budget changes
    BAD_PROTOCOL = 5  # another version of mlxspec answers on the socket: do not retry
