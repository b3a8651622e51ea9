"""Who killed the worker? (pure)

Requests that were on a worker when it died are replayed together. Those that were there at a second death
are suspects: a single one is condemned; several are isolated from each other, and the next death names the
culprit.
"""

from collections.abc import Sequence

from router.journal import LiveRequest

DEATHS_OF_A_SUSPECT = 2
MAX_DEATHS = 4
TOKENS_TO_CLEAR = 16  # past the point of the last death; a few tokens may have been lost on the way


def judge(dead: Sequence[LiveRequest]) -> list[LiveRequest]:
    """Count a death for each request of a dead worker; returns those to fail, marks those to be isolated."""
    for request in dead:
        request.deaths += 1
        request.tokens_at_death = len(request.token_ids)
    suspects = [request for request in dead if request.deaths >= DEATHS_OF_A_SUSPECT]
    isolated = [request for request in suspects if request.is_isolated]
    condemned = [request for request in suspects if request.deaths >= MAX_DEATHS]
    if len(isolated or suspects) == 1:
        (culprit,) = isolated or suspects
        return condemned if culprit in condemned else [culprit, *condemned]
    for request in suspects:
        request.is_isolated = True
    return condemned


def is_cleared(request: LiveRequest) -> bool:
    """Whether an isolated request got well past the point where its worker died."""
    return len(request.token_ids) >= request.tokens_at_death + TOKENS_TO_CLEAR
