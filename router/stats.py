"""GET /stats: what the server has done since it started."""

import time
from collections.abc import Iterable

from aiohttp import web
from msgspec import UNSET, UnsetType

from common.messages import DrafterLoad, Load, ModelEntry
from common.states import WorkerState
from router.answers import Answer, json_response
from router.app_keys import BACKEND, LEDGER, STATE
from router.ledger import Ledger, ModelTotals
from router.version import VERSION


class RequestStats(Answer, frozen=True, kw_only=True):
    """`outcomes` counts finished requests by finish reason or error code."""

    received: int
    live: int
    replayed: int
    outcomes: dict[str, int]


class TokenStats(Answer, frozen=True, kw_only=True):
    """`cached`: prompt tokens that came from the prefix cache; `per_second`: generated tokens over the last minute."""

    prompt: int
    cached: int
    generated: int
    drafted: int
    accepted: int
    per_second: float


class PrefixStats(Answer, frozen=True, kw_only=True):
    """The prefix cache of a model's present worker: of `lookups` requests `hits` found `hit_tokens` tokens."""

    lookups: int
    hits: int
    hit_tokens: int
    evictions: int
    bytes: int


class DrafterStats(Answer, frozen=True, kw_only=True):
    """One drafter of a present worker; `acceptance_by_position`: of its tokens at each place of a draft."""

    draft_tokens: int
    accepted_tokens: int
    acceptance_rate: float | UnsetType = UNSET
    acceptance_by_position: tuple[float, ...] = ()


class ModelStats(Answer, frozen=True, kw_only=True):
    """One model. The counters from `steps` on and `plain_step_ms` are its present worker's."""

    state: WorkerState
    running: int
    waiting: int
    requests: RequestStats
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    steps: int
    restarts: int
    memory_bytes: int
    kv_bytes: int
    preemptions: int
    prefix_cache: PrefixStats
    drafters: dict[str, DrafterStats]
    parked_rows: int
    probes: int
    acceptance_rate: float | UnsetType = UNSET
    speedup: float | UnsetType = UNSET
    plain_step_ms: float | UnsetType = UNSET


class MemoryStats(Answer, frozen=True, kw_only=True):
    used_bytes: int
    budget_bytes: int


class Stats(Answer, frozen=True, kw_only=True):
    version: str
    uptime_s: float
    requests: RequestStats
    tokens: TokenStats
    memory: MemoryStats
    models: dict[str, ModelStats]


async def show(request: web.Request) -> web.Response:
    backend, ledger = request.app[BACKEND], request.app[LEDGER]
    uptime_s = time.monotonic() - request.app[STATE].started_s
    table = backend.directory.table
    models = backend.directory.models
    return json_response(
        Stats(
            version=VERSION,
            uptime_s=round(uptime_s, 3),
            requests=_requests(ledger.models.values(), live=len(backend.journal)),
            tokens=_tokens(ledger, uptime_s),
            memory=MemoryStats(
                used_bytes=sum(_memory(model) for model in models),
                budget_bytes=table.memory_budget_bytes if table else 0,
            ),
            models={
                model.name: _model(
                    model,
                    ledger.models.get(model.name, ModelTotals()),
                    backend.loads.of_model(model),
                    live=sum(live.model == model.name for live in backend.journal),
                    waiting=backend.count_waiting(model.name),
                )
                for model in models
            },
        )
    )


def _requests(totals: Iterable[ModelTotals], *, live: int) -> RequestStats:
    totals = list(totals)
    outcomes: dict[str, int] = {}
    for model in totals:
        for outcome, count in model.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    return RequestStats(
        received=sum(model.started for model in totals),
        live=live,
        replayed=sum(model.replayed for model in totals),
        outcomes=outcomes,
    )


def _tokens(ledger: Ledger, uptime_s: float) -> TokenStats:
    totals = list(ledger.models.values())
    return TokenStats(
        prompt=sum(model.prompt_tokens for model in totals),
        cached=sum(model.cached_tokens for model in totals),
        generated=sum(model.generated_tokens for model in totals),
        drafted=sum(model.drafted_tokens for model in totals),
        accepted=sum(model.accepted_tokens for model in totals),
        per_second=round(ledger.recent_throughput(uptime_s), 3),
    )


def _model(model: ModelEntry, totals: ModelTotals, loads: list[Load], *, live: int, waiting: int) -> ModelStats:
    plain = next((load.plain_step_ms for load in loads if load.plain_step_ms is not None), None)
    return ModelStats(
        state=model.state,
        running=sum(load.running for load in loads),
        waiting=waiting + sum(load.waiting for load in loads),
        requests=_requests([totals], live=live),
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        generated_tokens=totals.generated_tokens,
        draft_tokens=totals.drafted_tokens,
        accepted_tokens=totals.accepted_tokens,
        steps=sum(load.steps for load in loads),
        restarts=model.restarts,
        memory_bytes=_memory(model),
        kv_bytes=sum(load.kv_bytes for load in loads),
        preemptions=sum(load.preempted for load in loads),
        prefix_cache=_prefixes(loads),
        drafters={drafter.name: _drafter(drafter) for load in loads for drafter in load.drafters},
        parked_rows=sum(load.parked for load in loads),
        probes=sum(load.probes for load in loads),
        acceptance_rate=_ratio(totals.accepted_tokens, totals.drafted_tokens),
        speedup=_ratio(totals.plain_decode_s, totals.measured_decode_s),
        plain_step_ms=UNSET if plain is None else round(plain, 3),
    )


def _drafter(load: DrafterLoad) -> DrafterStats:
    judged = [(stood, count) for stood, count in zip(load.stood, load.judged, strict=True) if count]
    return DrafterStats(
        draft_tokens=load.drafted,
        accepted_tokens=load.accepted,
        acceptance_rate=_ratio(load.accepted, load.drafted),
        acceptance_by_position=tuple(round(stood / count, 4) for stood, count in judged),
    )


def _prefixes(loads: list[Load]) -> PrefixStats:
    return PrefixStats(
        lookups=sum(load.prefix_lookups for load in loads),
        hits=sum(load.prefix_hits for load in loads),
        hit_tokens=sum(load.prefix_tokens for load in loads),
        evictions=sum(load.prefix_evictions for load in loads),
        bytes=sum(load.prefix_bytes for load in loads),
    )


def _memory(model: ModelEntry) -> int:
    return sum(worker.footprint_bytes for worker in model.workers)


def _ratio(part: float, whole: float) -> float | UnsetType:
    return round(part / whole, 4) if whole > 0 else UNSET
