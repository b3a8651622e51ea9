"""Who may be loaded and who has to go: pure decisions over a picture of the fleet.

Up to 85 % of the budget a model is loaded as it is; above it idle models make room, least recently used
first; above 95 % nothing is loaded. One eviction serves everybody who waits for its memory. Busy models take turns
with those that requests wait for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SOFT_SHARE = 0.85
HARD_SHARE = 0.95
LEAST_KV_BYTES = 64 * 2**20
MOST_CACHE_BYTES = 2 * 2**30
CACHE_PART = 8  # MLX's buffer cache gets one n-th of a worker's KV share
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Resident:
    """One model with a process. `charge_bytes` is what it holds, or will hold once it is loaded."""

    name: str
    charge_bytes: int
    last_used: float = 0.0
    is_ready: bool = True
    is_busy: bool = False
    is_pinned: bool = False
    is_awaited: bool = False  # loaded for a waiting request that it has not served yet
    is_leaving: bool = False
    ready_since: float = 0.0
    has_had_turn: bool = False  # loaded for so long that even if busy it may be told to make room

    @property
    def may_go(self) -> bool:
        return self.may_give_way and not self.is_busy

    @property
    def may_give_way(self) -> bool:
        is_held = self.is_pinned or self.is_awaited or self.is_leaving
        return self.is_ready and not is_held and (self.has_had_turn or not self.is_busy)

    @property
    def seniority(self) -> tuple[bool, float, str]:
        """Who goes first: the idle, least recently used, then the busy, longest loaded."""
        return self.is_busy, self.ready_since if self.is_busy else self.last_used, self.name


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker of a model that wants to be loaded.

    Restarts come first, then who is asked for, in that order; those that are not the first of their model come last.
    """

    name: str
    need_bytes: int
    asked_at: float = 0.0
    is_restart: bool = False
    is_extra: bool = False
    is_due: bool = False  # a request has waited for it for a whole turn
    worker: int = 0


@dataclass(frozen=True, slots=True)
class Admit:
    """Load it now."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Load it once these are gone."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """There will be room when somebody leaves or becomes idle."""

    detail: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It cannot fit, whoever leaves."""

    detail: str


Decision = Admit | Evict | Wait | Refuse


def in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Restarts first, then first come, first served, and what is not urgent at last."""
    return sorted(candidates, key=lambda c: (not c.is_restart, c.is_extra, c.asked_at, c.name, c.worker))


def decide(candidate: Candidate, residents: Sequence[Resident], budget_bytes: int) -> Decision:
    """Whether `candidate`, the head of the queue, can be loaded, and at whose expense."""
    need = candidate.need_bytes
    soft, hard = int(SOFT_SHARE * budget_bytes), int(HARD_SHARE * budget_bytes)
    if need > hard:
        return Refuse(_never(need, hard, budget_bytes))
    used = sum(r.charge_bytes for r in residents)
    if used + need <= soft:
        return Admit()
    staying = used - sum(r.charge_bytes for r in residents if r.is_leaving)
    idle = [r for r in residents if r.may_go]
    expendable = [r for r in residents if r.may_give_way] if candidate.is_due else idle
    for limit, pool in ((soft, idle), (hard, idle), (hard, expendable)):
        if staying + need <= limit:
            return Admit() if used + need <= limit else Wait(_waits_for_leaving(residents))
        victims = choose_victims(pool, staying + need - limit)
        if victims and not candidate.is_extra:
            return Evict(victims)
    return Wait(_waits_for_busy(need, max(0, hard - used), residents))


def choose_victims(expendable: Iterable[Resident], excess_bytes: int) -> tuple[str, ...]:
    """The first of them to go that together hold `excess_bytes`; none if all together do not."""
    chosen: list[Resident] = []
    for resident in sorted(expendable, key=lambda r: r.seniority):
        if sum(c.charge_bytes for c in chosen) >= excess_bytes:
            break
        chosen.append(resident)
    if sum(c.charge_bytes for c in chosen) < excess_bytes:
        return ()
    return _without_needless(chosen, excess_bytes)


def idle_too_long(residents: Iterable[Resident], patience_s: Mapping[str, float], now: float) -> tuple[str, ...]:
    """The models that nobody has used for their `patience_s`; 0: for ever."""
    idle = [r for r in residents if r.may_go and patience_s.get(r.name, 0.0) > 0]
    return tuple(r.name for r in idle if now >= r.last_used + patience_s[r.name])


def overdrawn(residents: Sequence[Resident], budget_bytes: int) -> tuple[str, ...]:
    """Idle models that have to go because loaded ones have grown beyond the hard limit.

    All of them, if even that is too little. Those that leave already count as gone.
    """
    staying = sum(r.charge_bytes for r in residents if not r.is_leaving)
    excess = staying - int(HARD_SHARE * budget_bytes)
    if excess <= 0:
        return ()
    idle = [r for r in residents if r.may_go]
    return choose_victims(idle, excess) or tuple(r.name for r in idle)


def longest_idle(residents: Iterable[Resident]) -> tuple[str, ...]:
    """The least recently used model that may go: under pressure they leave one by one."""
    idle = sorted((r for r in residents if r.may_go), key=lambda r: r.seniority)
    return tuple(r.name for r in idle[:1])


def _without_needless(chosen: Sequence[Resident], excess_bytes: int) -> tuple[str, ...]:
    """Spare the small old ones when a later, larger one alone frees enough."""
    kept = list(chosen)
    for resident in chosen:
        if sum(k.charge_bytes for k in kept) - resident.charge_bytes >= excess_bytes:
            kept.remove(resident)
    return tuple(k.name for k in kept)


def kv_share(budget_bytes: int, held_bytes: int, workers: int, configured_gb: float) -> int:
    """KV bytes for each of `workers` equal workers, when models hold `held_bytes` without their caches."""
    if configured_gb > 0:
        return int(configured_gb * GIB)
    return max(LEAST_KV_BYTES, (int(SOFT_SHARE * budget_bytes) - held_bytes) // max(1, workers))


def cache_share(kv_bytes: int) -> int:
    """Bytes that MLX may keep in its buffer cache beside a KV cache of `kv_bytes`."""
    return min(MOST_CACHE_BYTES, kv_bytes // CACHE_PART)


def _never(need: int, hard: int, budget: int) -> str:
    return (
        f"needs about {_gb(need)} of memory; of the budget of {_gb(budget)} at most {_gb(hard)} may be used: "
        "raise supervisor.memory_limit_gb or choose a smaller model"
    )


def _waits_for_leaving(residents: Iterable[Resident]) -> str:
    return f"waits for memory: {_names(r for r in residents if r.is_leaving)} is being unloaded"


def _waits_for_busy(need: int, free: int, residents: Iterable[Resident]) -> str:
    held = _names(r for r in residents if not r.may_go) or "none"
    return f"waits for memory: needs about {_gb(need)}, {_gb(free)} is free; busy or pinned: {held}"


def _names(residents: Iterable[Resident]) -> str:
    return ", ".join(sorted(r.name for r in residents))


def _gb(size: int) -> str:
    return f"{size / GIB:.2f} GB"
