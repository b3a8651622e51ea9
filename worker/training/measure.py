"""The truth about a trained drafter: acceptance on held-out text and on real prompts, costs, and whether it pays."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import msgspec
import numpy as np

from common.config import SpeculationConfig
from worker.heads import folder
from worker.heads.folder import Trained
from worker.heads.healed import HealedLayers
from worker.training import costs
from worker.training.acceptance import count
from worker.training.answers import Answers, answers
from worker.training.corpus import runs
from worker.training.costs import Costs
from worker.training.reading import Reader
from worker.training.synthesis import ANSWER, Written

DRAFT_TOKENS = 5
COPIED_TOKENS = SpeculationConfig().max_draft_tokens  # of a copy at most
LEAST_SPEEDUP = 1.05
TEMPERATURES = (0.0, folder.SAMPLED_AT)
_ROWS = (1, 4, 8)
_JUDGED_ROWS = 32


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Of drafts of DRAFT_TOKENS. `copying`: accept length where `suffix` copies what it is sure of, as in `combo`."""

    text: str
    temperature: float
    accept_length: float
    copying: float
    by_position: list[float]
    steps: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured. `speedups`: predicted, for each of `costs`, by acceptance on prompts at temperature 0."""

    acceptance: list[Acceptance]
    costs: list[Costs]
    speedups: list[float]
    best_length: int

    @property
    def pays(self) -> bool:
        return max(self.speedups) >= LEAST_SPEEDUP


def measure(
    model: nn.Module,
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    held_out: Written | None,
    ends: frozenset[int],
    most: int,
) -> Measured:
    """Answers of `most` tokens to the prompts (token ids), and the held-out rows if there are any."""
    texts = [("held-out", 0.0, [longest_answers(held_out)])] if held_out else []
    texts += [(folder.PROMPTS, t, answers(model, prompts, t, most, ends, seed=0)) for t in TEMPERATURES]
    if isinstance(trained, HealedLayers):
        trained.predict_all()
    reader = Reader(model, trained)
    try:
        found = [_acceptance(trained, reader, *text) for text in texts]
    finally:
        reader.close()
    priced = costs.measure(model, trained, _ROWS, DRAFT_TOKENS)
    greedy = next(one for one in found if one.text == folder.PROMPTS and one.temperature == 0.0)
    speedups = [cost.speedup(greedy.by_position) for cost in priced]
    return Measured(
        acceptance=found,
        costs=priced,
        speedups=[round(speedup, 3) for speedup, _ in speedups],
        best_length=speedups[0][1],
    )


def _acceptance(trained: Trained, reader: Reader, name: str, temperature: float, groups: list[Answers]) -> Acceptance:
    plain, copying = count(trained, reader, groups, DRAFT_TOKENS, (0, COPIED_TOKENS))
    return Acceptance(
        text=name,
        temperature=temperature,
        accept_length=round(plain.accept_length, 3),
        copying=round(copying.accept_length, 3),
        by_position=plain.by_position,
        steps=len(plain.accepted),
    )


def longest_answers(rows: Written) -> Answers:
    """The longest answer of each row, of JUDGED_ROWS rows at most."""
    tokens, kinds = rows.tokens[:_JUDGED_ROWS].astype(np.int32), rows.kinds[:_JUDGED_ROWS]
    spans = [_longest_run(row == ANSWER) for row in kinds]
    starts, ends = (np.array(side) for side in zip(*spans, strict=True))
    return Answers(tokens, np.maximum(starts, 1), ends, 0.0, 0)


def _longest_run(marks: np.ndarray[Any, Any]) -> tuple[int, int]:
    """[start, end) of the longest run of true marks."""
    return max(runs(marks), key=lambda run: run[1] - run[0], default=(0, 0))
