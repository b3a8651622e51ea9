"""GET /optimize: what the measured figures say should be set otherwise, each with its reason (all but `show` is pure).

Nothing is said of what has not been measured often enough to mean anything.
"""

from collections.abc import Iterator, Sequence

from aiohttp import web

from common.config import Config
from common.messages import Load, ModelEntry
from common.states import WorkerState
from router.answers import Answer, json_response
from router.app_keys import BACKEND, CONFIG, LEDGER
from router.ledger import ModelTotals

ENOUGH_REQUESTS = 20
ENOUGH_DRAFTED = 500
LITTLE_ACCEPTED = 0.2
MUCH_ACCEPTED = 0.8
SLOWER = 0.98  # speed-up of a model that speculation slows down
LONG_QUEUE = 0.25  # share of a request's time
MANY_PREEMPTED = 0.05  # share of requests
MANY_REFUSED = 0.01
FULL = 0.85
MANY_RESTARTS = 3
GIB = 2**30


class Advice(Answer, frozen=True, kw_only=True):
    """`setting` is the key of the configuration to change, `measured` the figure behind the reason."""

    setting: str
    change: str
    reason: str
    measured: float
    model: str | None = None


class AdviceAnswer(Answer, frozen=True, kw_only=True):
    """`requests` is how many finished requests the recommendations rest on."""

    requests: int
    recommendations: list[Advice]


async def show(request: web.Request) -> web.Response:
    backend, ledger, config = request.app[BACKEND], request.app[LEDGER], request.app[CONFIG]
    table = backend.directory.table
    found: list[Advice] = []
    for model in backend.directory.models:
        loads = backend.loads.of_model(model)
        found += on_model(model, ledger.models.get(model.name, ModelTotals()), loads, config)
    found += on_memory(backend.directory.models, table.memory_budget_bytes if table else 0)
    done = sum(totals.outcomes.total() for totals in ledger.models.values())
    return json_response(AdviceAnswer(requests=done, recommendations=found))


def on_model(model: ModelEntry, totals: ModelTotals, loads: Sequence[Load], config: Config) -> Iterator[Advice]:
    """What one model's own figures say."""
    yield from _on_deaths(model)
    yield from _on_speculation(model.name, totals, config)
    if totals.outcomes.total() >= ENOUGH_REQUESTS:
        yield from _on_queue(model.name, totals, config)
        yield from _on_refusals(model.name, totals)
        yield from _on_preemption(model.name, totals, loads)


def _on_speculation(name: str, totals: ModelTotals, config: Config) -> Iterator[Advice]:
    if totals.drafted_tokens < ENOUGH_DRAFTED:
        return
    accepted = totals.accepted_tokens / totals.drafted_tokens
    speedup = totals.plain_decode_s / totals.measured_decode_s if totals.measured_decode_s else 1.0
    if speedup < SLOWER:
        yield Advice(
            model=name,
            setting=f"models.{name}.drafter",
            change='set it to "none"',
            reason=f"speculation makes this model slower: {speedup:.2f} times plain decoding",
            measured=round(speedup, 4),
        )
    elif accepted < LITTLE_ACCEPTED and config.speculation.max_draft_tokens > 2:
        yield Advice(
            model=name,
            setting="speculation.max_draft_tokens",
            change=f"lower it from {config.speculation.max_draft_tokens} to {config.speculation.max_draft_tokens // 2}",
            reason=f"of {totals.drafted_tokens} draft tokens only {accepted:.0%} were accepted",
            measured=round(accepted, 4),
        )
    elif accepted > MUCH_ACCEPTED and config.speculation.max_draft_tokens <= 16:
        yield Advice(
            model=name,
            setting="speculation.max_draft_tokens",
            change=f"raise it from {config.speculation.max_draft_tokens} to {config.speculation.max_draft_tokens * 2}",
            reason=f"{accepted:.0%} of {totals.drafted_tokens} draft tokens were accepted: longer drafts may pay",
            measured=round(accepted, 4),
        )


def _on_queue(name: str, totals: ModelTotals, config: Config) -> Iterator[Advice]:
    share = totals.queue_s / totals.elapsed_s if totals.elapsed_s else 0.0
    if share > LONG_QUEUE:
        configured = config.models.get(name)
        size = (configured and configured.max_batch_size) or config.engine.max_batch_size
        yield Advice(
            model=name,
            setting=f"models.{name}.max_batch_size",
            change=f"raise it from {size}, if memory allows",
            reason=f"requests spend {share:.0%} of their time in the worker's queue",
            measured=round(share, 4),
        )


def _on_refusals(name: str, totals: ModelTotals) -> Iterator[Advice]:
    share = totals.outcomes["overloaded"] / totals.outcomes.total()
    if share > MANY_REFUSED:
        yield Advice(
            model=name,
            setting="engine.max_waiting",
            change="raise it, or send less at a time",
            reason=f"{share:.0%} of the requests found the worker's queue full",
            measured=round(share, 4),
        )


def _on_preemption(name: str, totals: ModelTotals, loads: Sequence[Load]) -> Iterator[Advice]:
    share = sum(load.preempted for load in loads) / totals.outcomes.total()
    if share > MANY_PREEMPTED:
        yield Advice(
            model=name,
            setting="engine.kv_headroom_tokens",
            change="raise it, give the KV cache more memory (engine.kv_cache_gb), or set engine.kv_bits to 8",
            reason=f"rows lost their slot for want of memory {share:.2f} times a request, and read their text again",
            measured=round(share, 4),
        )


def _on_deaths(model: ModelEntry) -> Iterator[Advice]:
    if model.restarts >= MANY_RESTARTS:
        yield Advice(
            model=model.name,
            setting="supervisor.memory_limit_gb",
            change="see the worker's log for why; if it ran out of memory, lower this or choose a smaller model",
            reason=f"its workers died {model.restarts} times; the last: {model.detail or 'no reason is known'}",
            measured=model.restarts,
        )


def on_memory(models: Sequence[ModelEntry], budget_bytes: int) -> Iterator[Advice]:
    """What the memory of all models together says."""
    used = sum(worker.footprint_bytes for model in models for worker in model.workers)
    unloaded = [model.name for model in models if model.state is WorkerState.STOPPED]
    if budget_bytes and used > FULL * budget_bytes and unloaded:
        yield Advice(
            setting="supervisor.memory_limit_gb",
            change=f"raise it above {budget_bytes / GIB:.1f}, unpin a model, or set kv_bits to 8",
            reason=f"models hold {used / budget_bytes:.0%} of the budget, and {len(unloaded)} more can only be loaded "
            "in place of others",
            measured=round(used / budget_bytes, 4),
        )
