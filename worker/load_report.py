"""What a worker tells of itself once a second: how busy it is, and its counters."""

from common.messages import DrafterLoad, Load
from worker.engine import Engine
from worker.loop import Pulse


def load_of(engine: Engine, pulse: Pulse) -> Load:
    """Read on the I/O thread while the engine steps: counters only, no arrays."""
    totals = engine.totals
    is_measured = engine.times.is_measured
    return Load(
        running=pulse.running,
        waiting=pulse.waiting,
        outstanding_tokens=pulse.outstanding_tokens,
        kv_bytes=pulse.kv_bytes,
        steps=totals.steps,
        prompt_tokens=totals.prompt_tokens,
        generated_tokens=totals.generated,
        drafted_tokens=totals.drafted,
        accepted_tokens=totals.accepted,
        plain_step_ms=engine.times.predict(1) * 1e3 if is_measured else None,
        speedup=totals.plain_decode_s / totals.measured_decode_s if totals.measured_decode_s else None,
        prefix_lookups=engine.prefixes.lookups,
        prefix_hits=engine.prefixes.hits,
        prefix_tokens=engine.prefixes.hit_tokens,
        prefix_evictions=engine.prefixes.tree.evictions,
        prefix_bytes=engine.prefixes.tree.nbytes,
        preempted=totals.preempted,
        drafters=_drafter_loads(engine),
        parked=totals.parked,
        probes=engine.drafting.controller.probes,
    )


def _drafter_loads(engine: Engine) -> tuple[DrafterLoad, ...]:
    """Counters of the drafters that have drafted; the lists are copied, as the loop may add to them meanwhile."""
    positions = dict(engine.drafting.controller.positions)
    return tuple(
        DrafterLoad(
            name=name,
            drafted=totals.drafted,
            accepted=totals.accepted,
            judged=tuple(place.judged for place in positions.get(name, ())),
            stood=tuple(place.accepted for place in positions.get(name, ())),
        )
        for name, totals in dict(engine.totals.drafters).items()
    )
