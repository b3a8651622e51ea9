"""Whether a worker hangs: told by its loop's own step counter, not by the fact that some thread still talks.

Time is counted in glances of the supervisor, each worth three quarters of a second at most: if the whole machine
slept, or the supervisor itself stood still, no worker is blamed for it.
"""

from dataclasses import dataclass

from common.config import SupervisorConfig
from common.messages import Heartbeat

GLANCE_S = 0.75
PATIENCE_FACTOR = 2.5  # noticed before three times the slowest step
LONG_PHASES = ("loading", "compile")


@dataclass(slots=True)
class StallWatch:
    """One worker's pulse. `still_s` is how long its loop has stood still, as far as we have looked."""

    still_s: float = 0.0
    phase: str = "loading"
    slowest_step_s: float = 0.0
    _loop_seq: int = -1
    _looked_at: float | None = None

    def observe(self, heartbeat: Heartbeat) -> None:
        """Take in a heartbeat. While a model loads there is no loop yet, and talking is enough."""
        if heartbeat.loop_seq != self._loop_seq or heartbeat.phase != self.phase or heartbeat.phase == "loading":
            self.still_s = 0.0
        self._loop_seq, self.phase = heartbeat.loop_seq, heartbeat.phase
        self.slowest_step_s = max(self.slowest_step_s, heartbeat.slowest_step_s)

    def glance(self, now: float) -> None:
        """Count the time since the last glance, after all heartbeats that have come."""
        if self._looked_at is not None:
            self.still_s += min(now - self._looked_at, GLANCE_S)
        self._looked_at = now

    def patience_s(self, limits: SupervisorConfig) -> float:
        """How long it may stand still where it is."""
        if self.phase in LONG_PHASES:
            return limits.compile_timeout_s
        return max(limits.hang_timeout_s, PATIENCE_FACTOR * self.slowest_step_s)

    def verdict(self, limits: SupervisorConfig) -> str:
        """Why it is taken for hung, or nothing."""
        patience_s = self.patience_s(limits)
        if self.still_s < patience_s:
            return ""
        return (
            f"hung: its loop stood still for {self.still_s:.1f} s in phase {self.phase!r} "
            f"(allowed are {patience_s:.1f} s; its slowest step took {self.slowest_step_s:.1f} s)"
        )
