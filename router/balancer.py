"""Which worker gets the next request (pure)."""

from collections.abc import Mapping


def pick(outstanding_tokens: Mapping[str, int]) -> str | None:
    """The identity of the worker that owes the fewest tokens; ties go to the first name."""
    return min(outstanding_tokens, key=lambda worker: (outstanding_tokens[worker], worker), default=None)
