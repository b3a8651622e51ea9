"""Measures a model's step times at load, and keeps them for the next start of the same model on the same device."""

import hashlib
import logging
import time
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from common import paths
from common.logs import fields
from common.sampling import Sampling
from worker import backend, step_times
from worker.cache.layout import Segment
from worker.drafters.drafter import Draft
from worker.request import Request, Row
from worker.step_times import StepTimes
from worker.target import Target
from worker.verification import Feed, verify

LARGEST = 128  # tokens of the largest step that is timed at load
LARGEST_COMPILED = 256  # tokens of the largest step that is compiled at load
BUDGET_S = 5.0  # a machine too busy for it is timed less often, and again at the next start
_ROWS = 8
_CONTEXT = 32
_EDITION = 7  # of how steps and drafts are made and timed: what an older one took says nothing

log = logging.getLogger(__name__)


def measured_times(target: Target, model_path: str, weights: str) -> StepTimes:
    """Step times of this model here: as an earlier worker measured them, or measured now (a second or two)."""
    kept = file(model_path, weights)
    times = step_times.load(kept)
    if times is not None and times.is_measured:
        times.sizes = target.state.sizes
        _compile(target)
        return times
    times = StepTimes(sizes=target.state.sizes)
    _compile(target)
    _fill(target)
    if times.calibrate(lambda tokens: _time_step(target, tokens), _timed_sizes(target), BUDGET_S):
        step_times.save(times, kept)
    target.clear()
    shown = {f"tokens_{n}_ms": s * 1e3 for n, s in zip(step_times.GRID, times.seconds, strict=True) if s is not None}
    log.info("Measured the step times. %s", fields(**shown))
    return times


def _timed_sizes(target: Target) -> list[int]:
    """All of the grid where steps are compiled, and so are quick; else a few of it."""
    if target.state.is_by_token:
        return [size for size in step_times.GRID if size <= LARGEST_COMPILED]
    return [size for size in step_times.TIMED if size <= LARGEST]


def _compile(target: Target) -> None:
    """Make a step of each usual size, where each is compiled by itself: not when somebody waits for it."""
    if not target.state.is_by_token:
        return
    _fill(target)
    for size in sorted({target.state.sizes.padded(size) for size in range(1, LARGEST_COMPILED + 1)}):
        _time_step(target, size)
    target.clear()


def _time_step(target: Target, tokens: int) -> float:
    """Seconds of one step of `tokens` tokens in up to 8 rows, the choice of the next tokens included."""
    rows = min(tokens, _ROWS)
    feeds = [_feed(row, tokens // rows + (row < tokens % rows)) for row in range(rows)]
    began = time.perf_counter()
    verify(target, feeds)
    taken_s = time.perf_counter() - began
    for feed in feeds:
        target.state.commit(feed.row.slot, _CONTEXT)
    return taken_s


def _feed(slot: int, width: int) -> Feed:
    """A row with `_CONTEXT` tokens in its slot, its pending token and a draft."""
    row = Row.of(Request("timed", (1,) * (_CONTEXT + 1), Sampling(), max_tokens=width), slot, 0.0)
    row.cached = _CONTEXT
    return Feed(row, 1, Draft("", 0, width - 1, (1,) * (width - 1)))


def _fill(target: Target) -> None:
    """Leave `_CONTEXT` tokens in each row."""
    segments = [Segment(row, 0, _CONTEXT) for row in range(_ROWS)]
    mx.eval(target.forward(segments, [1] * _CONTEXT * _ROWS, [0]), target.cached_arrays())
    for segment in segments:
        target.state.commit(segment.slot, _CONTEXT)


def file(what: str, weights: str) -> Path:
    """Where measurements of `what` (a model's path) on this device are kept."""
    what = f"{_EDITION}|{what}|{weights}|{backend.describe()}|{metadata.version('mlx')}"
    return paths.home() / "calibration" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
