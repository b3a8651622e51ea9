"""When a worker counts as hung: a toy case, a table, and time that nobody has looked."""

import pytest

from common.config import SupervisorConfig
from common.messages import Heartbeat
from router.supervisor.stall import StallWatch

LIMITS = SupervisorConfig(hang_timeout_s=9.0, compile_timeout_s=120.0)


def beat(seq: int, phase: str = "step", slowest_step_s: float = 0.0) -> Heartbeat:
    return Heartbeat(
        loop_seq=seq,
        phase=phase,
        running=1,
        waiting=0,
        finished=0,
        active_bytes=0,
        cache_bytes=0,
        footprint_bytes=0,
        slowest_step_s=slowest_step_s,
    )


def noticed_after(watch: StallWatch, *, most_s: float, heartbeat: Heartbeat | None) -> float | None:
    """Seconds of half-second glances until a hang is noticed; `heartbeat` comes all the while."""
    for half in range(int(2 * most_s) + 1):
        if heartbeat:
            watch.observe(heartbeat)
        watch.glance(half / 2)
        if watch.verdict(LIMITS):
            return half / 2
    return None


@pytest.mark.parametrize("talks", [True, False], ids=["a thread still talks", "silent"])
def test_loop_that_stands_still_is_noticed_within_ten_seconds(talks: bool) -> None:
    watch = StallWatch()
    watch.observe(beat(7))
    assert noticed_after(watch, most_s=10, heartbeat=beat(7) if talks else None) == 9.0
    assert "stood still for 9.0 s in phase 'step'" in watch.verdict(LIMITS)


@pytest.mark.parametrize(
    ("phase", "slowest_s", "noticed_s"),
    [("step", 2.0, 9.0), ("idle", 0.0, 9.0), ("step", 8.0, 20.0), ("compile", 0.0, 120.0)],
)
def test_patience_is_that_of_the_phase_and_of_the_slowest_step(phase: str, slowest_s: float, noticed_s: float) -> None:
    watch = StallWatch()
    watch.observe(beat(7, phase, slowest_s))
    assert noticed_after(watch, most_s=200, heartbeat=None) == noticed_s
    assert noticed_s <= max(10.0, 3 * slowest_s) or phase == "compile"


def test_long_prefill_of_slow_steps_is_no_hang() -> None:
    watch = StallWatch()
    for half in range(60):
        watch.observe(beat(half // 10))  # one step in five seconds
        watch.glance(half / 2)
        assert watch.verdict(LIMITS) == ""


def test_compile_that_keeps_all_threads_for_30_s_is_no_hang() -> None:
    watch = StallWatch()
    watch.observe(beat(7, "step"))
    watch.observe(beat(7, "compile"))  # told before it begins
    assert noticed_after(watch, most_s=30, heartbeat=None) is None
    watch.observe(beat(8, "step"))
    assert watch.still_s == 0


def test_loading_is_no_hang_while_it_talks() -> None:
    watch = StallWatch()
    assert noticed_after(watch, most_s=600, heartbeat=beat(0, "loading")) is None
    assert noticed_after(StallWatch(), most_s=600, heartbeat=None) == 120.0


def test_time_in_which_nobody_looked_counts_for_little() -> None:
    watch = StallWatch()
    watch.observe(beat(7))
    for now in (0.0, 0.5, 3600.0, 7200.0):
        watch.glance(now)
    assert watch.still_s == 2.0
    assert watch.verdict(LIMITS) == ""
