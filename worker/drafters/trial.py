"""A drafter that computes is tried before it is used: how often it agrees with its target, and what it costs.

What a trial finds is kept beside the step times for the next start. `auto` takes only those that promise a gain.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from common.logs import fields
from common.sampling import Sampling
from worker.cache.layout import Segment
from worker.drafters.chain import ChainDrafter
from worker.drafters.head import HeadDrafter
from worker.drafters.layers import LayersDrafter, block_influence, most_influential
from worker.request import Request, Row
from worker.step_times import TIMED, StepTimes
from worker.target import Target

TEXT = (
    "The river rises in the hills to the north, where rain falls on three days out of four, and runs some ninety "
    "miles to the sea. Two mills still stand on it. In 1871 the larger one was bought by a family of printers, who "
    'made paper from rags until the war. "We never threw anything away," their last foreman said, "not even string."'
)
MOST_TOKENS = 96  # of the text
LARGEST_STEP = 16  # rows of the largest drafting step that is timed
BUDGET_S = 1.5
LONGEST_CHAIN = 8
TIMED_CHAIN = 4  # positions of a chain that are timed together: nobody waits for the device between them

log = logging.getLogger(__name__)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about a drafter.

    `agreement`: share of positions where drafter and target have the same likeliest token. `seconds` of a drafting step
    by the sizes of `step_times.GRID`, and whether they are steady enough to be kept. `kept`: the layers of `layers`.
    """

    agreement: float
    seconds: tuple[float | None, ...]
    is_steady: bool
    kept: tuple[int, ...] = ()

    @property
    def times(self) -> StepTimes:
        return StepTimes(seconds=list(self.seconds))


def try_layers(target: Target, tokens: Sequence[int], ratio: float) -> Trial:
    """Choose the layers that a `layers` drafter keeps, and try it. Raises `NoLayers`."""
    kept = most_influential(block_influence(target, tokens), ratio)
    drafter = LayersDrafter(target, StepTimes(), kept)
    return _tried(target, drafter, tokens, kept)


def try_model(target: Target, drafter: ChainDrafter, tokens: Sequence[int]) -> Trial:
    """Try a drafter with a cache of its own."""
    return _tried(target, drafter, tokens, ())


def try_head(target: Target, drafter: HeadDrafter, tokens: Sequence[int]) -> Trial:
    """Try a trained head, which sees the target's own hidden states of the text."""
    packed = mx.array(list(tokens), dtype=mx.int32)
    own = mx.argmax(target.forward([Segment(0, 0, len(tokens))], packed, range(len(tokens))), axis=-1)
    agreement = mx.mean(own[1:] == drafter.guesses(tokens))
    mx.eval(agreement)
    target.clear()
    return _timed(drafter.name, target, lambda rows: time_head(drafter, rows), float(agreement), ())


def is_promising(acceptance: Sequence[float], draft_s: Callable[[int], float], step_s: Callable[[int], float]) -> bool:
    """Whether a chain of some length would be faster than plain decoding for one row, at this acceptance by depth."""
    expected, reach = 1.0, 1.0
    for length in range(1, LONGEST_CHAIN + 1):
        reach *= acceptance[min(length, len(acceptance)) - 1]
        expected += reach
        if expected / (step_s(1 + length) + length * draft_s(1)) > 1.0 / step_s(1):
            return True
    return False


def load(file: Path) -> Trial | None:
    """What an earlier worker found, or None."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Trial)
    except (OSError, msgspec.DecodeError):
        return None


def save(trial: Trial, file: Path) -> None:
    """Keep it for the next start."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.encode(trial))


def _tried(target: Target, drafter: ChainDrafter, tokens: Sequence[int], kept: Sequence[int]) -> Trial:
    own = _likeliest(target, target.forward, tokens)
    drafted = _likeliest(drafter.target, drafter.forward, tokens)
    agreement = sum(a == b for a, b in zip(own, drafted, strict=True)) / len(own)
    return _timed(drafter.name, drafter.target, lambda rows: time_step(drafter, rows), agreement, kept)


def _timed(name: str, target: Target, run: Callable[[int], float], agreement: float, kept: Sequence[int]) -> Trial:
    times = StepTimes()
    is_steady = times.calibrate(run, [size for size in TIMED if size <= LARGEST_STEP], BUDGET_S, rounds=3)
    target.clear()
    log.info("Tried a drafter. %s", fields(drafter=name, agreement=agreement, step_s=times.seconds[0]))
    return Trial(agreement=agreement, seconds=tuple(times.seconds), is_steady=is_steady, kept=tuple(kept))


def _likeliest(
    target: Target, forward: Callable[[Sequence[Segment], mx.array, Sequence[int]], mx.array], tokens: Sequence[int]
) -> list[int]:
    """The likeliest next token after each token of a text."""
    packed = mx.array(list(tokens), dtype=mx.int32)
    best = mx.argmax(forward([Segment(0, 0, len(tokens))], packed, range(len(tokens))), axis=-1)
    mx.eval(best)
    target.clear()
    return [int(token) for token in best.tolist()]  # type: ignore[union-attr,arg-type]


def time_step(drafter: ChainDrafter, rows: int) -> float:
    """Seconds of one position of a chain for so many rows at the start of their cache."""
    began = time.perf_counter()
    tokens = mx.ones(rows, mx.int32)
    for _ in range(TIMED_CHAIN):
        logits = drafter.forward([Segment(row, 0, 1) for row in range(rows)], tokens, range(rows))
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    mx.eval(tokens)
    return (time.perf_counter() - began) / TIMED_CHAIN


def time_head(drafter: HeadDrafter, rows: int) -> float:
    """As `time_step`, of a head."""
    request = Request("trial", (1,), Sampling(), max_tokens=TIMED_CHAIN)
    tried = [Row.of(request, slot, 0.0) for slot in range(rows)]
    began = time.perf_counter()
    mx.eval(drafter.chain(tried, TIMED_CHAIN))
    return (time.perf_counter() - began) / TIMED_CHAIN
