"""The memory budget at work: who has to go, and how much each worker may use for keys, values and buffers."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.config import Config
from common.logs import fields
from common.messages import SetLimits
from common.states import WorkerState
from router.supervisor import memory, policy, pressure
from router.supervisor.model import Model
from router.supervisor.pressure import Pressure
from router.supervisor.worker import Worker

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at the machine's memory
RELIEF_S = 5.0  # what an eviction under pressure gets to show in the system's figures
RESEND_PART = 16  # limits that differ by less than one n-th are not worth a message


class Budget:
    """Counts what models hold, and decides over what they may hold."""

    def __init__(self, config: Config, read_pressure: Callable[[], Pressure] = pressure.read) -> None:
        self.pressure = Pressure.NORMAL
        self._read_pressure = read_pressure
        self._looked_at = self._relieved_at = float("-inf")
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a new configuration."""
        self._config = config
        self.total_bytes = memory.budget(config.supervisor)

    def idle_unload_s(self, model: Model) -> float:
        """How long it may be idle; 0: for ever."""
        own = model.settings.idle_unload_s
        return self._config.supervisor.idle_unload_s if own is None else own

    def look(self, now: float) -> bool:
        """Read the machine's state if that is due; whether it has changed."""
        if now < self._looked_at + LOOK_EVERY_S:
            return False
        self._looked_at = now
        before, self.pressure = self.pressure, self._read_pressure()
        if self.pressure is not before:
            log.warning("memory pressure %s", fields(level=self.pressure.name, was=before.name))
        return self.pressure is not before

    def surplus(self, models: Iterable[Model], now: float) -> Mapping[str, str]:
        """The models that have to be unloaded now though nobody else wants their room, and why."""
        loaded = [model for model in models if model.has_process]
        residents = [model.resident(now) for model in loaded]
        patience_s = {model.name: self.idle_unload_s(model) for model in loaded}
        reasons = dict.fromkeys(policy.idle_too_long(residents, patience_s, now), "idle")
        reasons |= dict.fromkeys(policy.overdrawn(residents, self.total_bytes), "over the memory limit")
        if self.pressure is Pressure.CRITICAL and not reasons and now >= self._relieved_at + RELIEF_S:
            if relieving := policy.longest_idle(residents):
                self._relieved_at = now
            reasons |= dict.fromkeys(relieving, "the machine is short of memory")
        return reasons

    def shares(self, workers: Sequence[Worker]) -> Iterable[tuple[Worker, SetLimits]]:
        """The limits of each ready worker where they are news to it: an equal share of what all others leave."""
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        held = sum(worker.base_bytes if worker in ready else worker.charge_bytes() for worker in workers)
        configured_gb = self._config.engine.kv_cache_gb
        share = policy.kv_share(self.total_bytes, held, len(ready), configured_gb)
        is_short = self.pressure is not Pressure.NORMAL
        cache = policy.cache_share(share)
        kv = share if configured_gb > 0 else share - cache
        limits = SetLimits(kv_bytes=kv, cache_bytes=0 if is_short else cache, shrink=is_short)
        return [(worker, limits) for worker in ready if _is_news(worker.limits, limits)]


def _is_news(before: SetLimits | None, after: SetLimits) -> bool:
    if before is None or before.shrink is not after.shrink:
        return True
    return abs(before.kv_bytes - after.kv_bytes) * RESEND_PART > before.kv_bytes
