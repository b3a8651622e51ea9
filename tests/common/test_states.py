"""States: the edges that ARCHITECTURE promises, spelled out once more, so that a new one is a decision."""

import itertools

import pytest

from common.states import LEGAL_EDGES, WorkerState

FOLLOWERS = {
    "stopped": {"starting", "failed"},
    "starting": {"loading", "stopping", "backoff", "failed"},
    "loading": {"ready", "stopping", "backoff", "failed"},
    "ready": {"draining", "stopping", "backoff", "failed"},
    "draining": {"stopping", "stopped"},
    "stopping": {"stopped"},
    "backoff": {"starting", "stopped"},
    "failed": {"starting", "stopped"},
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WorkerState, WorkerState)))
def test_edge_is_legal_or_not(before: WorkerState, after: WorkerState) -> None:
    assert ((before, after) in LEGAL_EDGES) == (after in FOLLOWERS[before])


def test_every_state_can_be_reached_and_left() -> None:
    reached = {WorkerState.STOPPED}
    while fresh := {after for before, after in LEGAL_EDGES if before in reached} - reached:
        reached |= fresh
    assert reached == set(WorkerState)
    assert {before for before, _ in LEGAL_EDGES} == set(WorkerState)
