"""GET /metrics: Prometheus, under vLLM's names where it has them, so that existing dashboards work."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.messages import Load, ModelEntry, WorkerEntry
from common.states import WorkerState
from router.app_keys import METERS
from router.backend import Backend
from router.meters import MODEL

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BY_DRAFTER = [*MODEL, "drafter"]


@dataclass(frozen=True, slots=True)
class ModelView:
    """What is known of one model at the moment; `waiting` requests have no worker yet."""

    entry: ModelEntry
    loads: tuple[Load, ...]
    waiting: int
    step_age_s: float | None

    @property
    def workers(self) -> tuple[WorkerEntry, ...]:
        return self.entry.workers

    def total(self, of: Callable[[Load], int]) -> int:
        """A figure of all its workers together."""
        return sum(of(load) for load in self.loads)


Figure = Callable[[ModelView], float | None]  # None: not known

GAUGES: tuple[tuple[str, str, Figure], ...] = (
    ("vllm:num_requests_running", "Requests in a worker's batch", lambda m: m.total(lambda w: w.running)),
    ("vllm:num_requests_waiting", "Requests in a queue", lambda m: m.waiting + m.total(lambda w: w.waiting)),
    ("mlxspec_model_ready", "1 when loaded", lambda m: m.entry.state == WorkerState.READY),
    ("vllm:kv_cache_usage_perc", "Part of its memory for keys and values in use", lambda m: _kv_usage(m.entry)),
    ("mlxspec_memory_footprint_bytes", "Memory of its workers", lambda m: sum(w.footprint_bytes for w in m.workers)),
    ("mlxspec_memory_active_bytes", "Memory of live arrays", lambda m: sum(w.active_bytes for w in m.workers)),
    ("mlxspec_memory_cache_bytes", "Memory that MLX keeps", lambda m: sum(w.cache_bytes for w in m.workers)),
    ("mlxspec_kv_bytes", "Size of its KV caches", lambda m: m.total(lambda w: w.kv_bytes)),
    ("mlxspec_prefix_cache_bytes", "Size of the prefix cache", lambda m: m.total(lambda w: w.prefix_bytes)),
    ("mlxspec_parked_rows", "Rows that draft nothing at present", lambda m: m.total(lambda w: w.parked)),
    ("mlxspec_speculation_speedup", "Plain time over measured time", lambda m: _speedup(m.loads)),
    ("mlxspec_engine_step_age_seconds", "Since a busy worker's last step, to a second", lambda m: m.step_age_s),
)
COUNTERS: tuple[tuple[str, str, Figure], ...] = (
    ("vllm:num_preemptions", "Rows that lost their slot for a while", lambda m: m.total(lambda w: w.preempted)),
    ("vllm:prefix_cache_queries", "Prompt tokens that were looked up", lambda m: m.total(lambda w: w.prompt_tokens)),
    ("vllm:prefix_cache_hits", "Tokens that the prefix cache had", lambda m: m.total(lambda w: w.prefix_tokens)),
    ("vllm:spec_decode_num_drafts", "Drafts that were verified", lambda m: m.total(_drafts)),
    ("mlxspec_prefix_cache_evictions", "Spans dropped for room", lambda m: m.total(lambda w: w.prefix_evictions)),
)


class LiveCollector(Collector):
    """Gauges and the counters of workers and supervisor, read when they are asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        models = self._views()
        for name, text, figure in GAUGES:
            yield _fill(GaugeMetricFamily(name, text, labels=MODEL), models, figure)
        for name, text, figure in COUNTERS:
            yield _fill(CounterMetricFamily(name, text, labels=MODEL), models, figure)
        yield from _drafters(models)
        yield _restarts(models)
        if table := self._backend.directory.table:
            budget, pressure = table.memory_budget_bytes, table.memory_pressure
            yield GaugeMetricFamily("mlxspec_memory_budget_bytes", "Limit for all models", value=budget)
            yield GaugeMetricFamily("mlxspec_memory_pressure_level", "1 normal, 2 short, 4 critical", value=pressure)
        ignored = CounterMetricFamily("mlxspec_ignored_frames", "Frames that are no message", labels=["reason"])
        for reason, count in self._backend.observers.ignored_frames.items():
            ignored.add_metric([reason], count)
        yield ignored

    def _views(self) -> list[ModelView]:
        backend, now_s = self._backend, time.monotonic()
        return [
            ModelView(
                entry=model,
                loads=tuple(backend.loads.of_model(model)),
                waiting=backend.count_waiting(model.name),
                step_age_s=backend.loads.step_age_s(model, now_s),
            )
            for model in backend.directory.models
        ]


def _fill(family: Metric, models: list[ModelView], figure: Figure) -> Metric:
    assert isinstance(family, GaugeMetricFamily | CounterMetricFamily)
    for model in models:
        if (value := figure(model)) is not None:
            family.add_metric([model.entry.name], value)
    return family


def _restarts(models: list[ModelView]) -> Metric:
    name, text = "mlxspec_worker_restarts", "Workers that followed a dead one"
    family = CounterMetricFamily(name, text, labels=[*MODEL, "reason"])
    for model in models:
        for reason, count in model.entry.restarts_by_death.items():
            family.add_metric([model.entry.name, reason], count)
    return family


def _drafters(models: list[ModelView]) -> Iterator[Metric]:
    drafted = CounterMetricFamily("mlxspec_drafter_draft_tokens", "Tokens drafted", labels=BY_DRAFTER)
    accepted = CounterMetricFamily("mlxspec_drafter_accepted_tokens", "Draft tokens that stood", labels=BY_DRAFTER)
    by_place = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens that stood", labels=[*BY_DRAFTER, "position"]
    )
    for model in models:
        for drafter in (drafter for load in model.loads[:1] for drafter in load.drafters):
            labels = [model.entry.name, drafter.name]
            drafted.add_metric(labels, drafter.drafted)
            accepted.add_metric(labels, drafter.accepted)
            for position, stood in enumerate(drafter.stood):
                by_place.add_metric([*labels, str(position)], stood)
    yield from (drafted, accepted, by_place)


def _kv_usage(model: ModelEntry) -> float | None:
    limit = sum(worker.kv_limit_bytes for worker in model.workers)
    return sum(worker.kv_bytes for worker in model.workers) / limit if limit else None


def _speedup(loads: tuple[Load, ...]) -> float | None:
    return next((load.speedup for load in loads if load.speedup is not None), None)


def _drafts(load: Load) -> int:
    """Each draft has one first token."""
    return sum(drafter.judged[0] for drafter in load.drafters if drafter.judged)


async def show(request: web.Request) -> web.Response:
    body = generate_latest(request.app[METERS].registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
