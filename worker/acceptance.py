"""The acceptance rule: a draft token stands iff it is the token that the target itself chose there."""

from collections.abc import Collection, Sequence

import msgspec


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What a row gains in a step. `tokens`: the accepted draft tokens and the target's own next one, cut at an end.

    `accepted` counts the draft tokens among them; `finish` is the reason if the row ends here, else None.
    """

    tokens: tuple[int, ...]
    accepted: int
    finish: str | None


def accept(draft: Sequence[int], own: Sequence[int], tokens_left: int, end_tokens: Collection[int]) -> Verdict:
    """Judge a draft by the target's own choices (one more than the draft has tokens).

    The first choice that differs from the draft replaces it and ends the step's gain; after a draft without fault the
    last choice is a bonus. An end token or the token limit cuts inside the block.
    """
    assert len(own) == len(draft) + 1 and tokens_left > 0
    matched = next((i for i, (d, t) in enumerate(zip(draft, own, strict=False)) if d != t), len(draft))
    gained = own[: matched + 1]
    for i, token in enumerate(gained, start=1):
        if token in end_tokens:
            return Verdict(tuple(gained[:i]), min(i, matched), "stop")
        if i == tokens_left:
            return Verdict(tuple(gained[:i]), min(i, matched), "length")
    return Verdict(tuple(gained), matched, None)
