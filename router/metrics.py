"""GET /metrics: Prometheus, under vLLM's names where it has them, so that existing dashboards work."""

from collections.abc import Iterator

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.states import WorkerState
from router.app_keys import METERS
from router.backend import Backend
from router.meters import MODEL

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class LiveCollector(Collector):
    """Gauges and the supervisor's counters, read when they are asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._models()
        yield from self._prefixes()
        yield from self._drafters()
        ignored = CounterMetricFamily(
            "mlxspec_ignored_frames", "Frames that are no worker's message", labels=["reason"]
        )
        for reason, count in self._backend.observers.ignored_frames.items():
            ignored.add_metric([reason], count)
        yield ignored

    def _requests(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in a worker's batch", labels=MODEL)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests in a queue", labels=MODEL)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Rows that lost their slot for a while", labels=MODEL)
        for model in self._backend.directory.models:
            loads = [load for w in model.workers if (load := self._backend.loads.get(w.identity))]
            running.add_metric([model.name], sum(load.running for load in loads))
            in_worker = sum(load.waiting for load in loads)
            waiting.add_metric([model.name], in_worker + self._backend.count_waiting(model.name))
            preempted.add_metric([model.name], sum(load.preempted for load in loads))
        yield from (running, waiting, preempted)

    def _models(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("mlxspec_model_ready", "1 when loaded", labels=MODEL)
        restarts = CounterMetricFamily("mlxspec_worker_restarts", "Workers that died", labels=MODEL)
        footprint = GaugeMetricFamily("mlxspec_memory_footprint_bytes", "Memory of its workers", labels=MODEL)
        speedup = GaugeMetricFamily("mlxspec_speculation_speedup", "Plain time over measured time", labels=MODEL)
        for model in self._backend.directory.models:
            ready.add_metric([model.name], model.state == WorkerState.READY)
            restarts.add_metric([model.name], model.restarts)
            footprint.add_metric([model.name], sum(worker.footprint_bytes for worker in model.workers))
            loads = [load for w in model.workers if (load := self._backend.loads.get(w.identity))]
            for load in loads[:1]:
                if load.speedup is not None:
                    speedup.add_metric([model.name], load.speedup)
        table = self._backend.directory.table
        budget = table.memory_budget_bytes if table else 0
        yield from (ready, restarts, footprint, speedup)
        yield GaugeMetricFamily("mlxspec_memory_budget_bytes", "Limit for all models", value=budget)

    def _drafters(self) -> Iterator[Metric]:
        labels = [*MODEL, "drafter"]
        drafted = CounterMetricFamily("mlxspec_drafter_draft_tokens", "Tokens drafted", labels=labels)
        accepted = CounterMetricFamily("mlxspec_drafter_accepted_tokens", "Draft tokens that stood", labels=labels)
        by_place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens that stood", labels=[*labels, "position"]
        )
        parked = GaugeMetricFamily("mlxspec_parked_rows", "Rows that draft nothing at present", labels=MODEL)
        for model in self._backend.directory.models:
            loads = [load for w in model.workers if (load := self._backend.loads.get(w.identity))]
            parked.add_metric([model.name], sum(load.parked for load in loads))
            for drafter in (drafter for load in loads[:1] for drafter in load.drafters):
                drafted.add_metric([model.name, drafter.name], drafter.drafted)
                accepted.add_metric([model.name, drafter.name], drafter.accepted)
                for position, stood in enumerate(drafter.stood):
                    by_place.add_metric([model.name, drafter.name, str(position)], stood)
        yield from (drafted, accepted, by_place, parked)

    def _prefixes(self) -> Iterator[Metric]:
        queries = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens that were looked up", labels=MODEL)
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Tokens that the prefix cache had", labels=MODEL)
        evictions = CounterMetricFamily("mlxspec_prefix_cache_evictions", "Spans dropped for room", labels=MODEL)
        size = GaugeMetricFamily("mlxspec_prefix_cache_bytes", "Size of the prefix cache", labels=MODEL)
        for model in self._backend.directory.models:
            loads = [load for w in model.workers if (load := self._backend.loads.get(w.identity))]
            queries.add_metric([model.name], sum(load.prompt_tokens for load in loads))
            hits.add_metric([model.name], sum(load.prefix_tokens for load in loads))
            evictions.add_metric([model.name], sum(load.prefix_evictions for load in loads))
            size.add_metric([model.name], sum(load.prefix_bytes for load in loads))
        yield from (queries, hits, evictions, size)


async def show(request: web.Request) -> web.Response:
    body = generate_latest(request.app[METERS].registry)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
