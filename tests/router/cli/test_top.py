"""The live view: its curves, and what it makes of two looks."""

import io

from rich.console import Console

from router.cli.top import History, render, sparkline

STATS = {
    "version": "1",
    "uptime_s": 10.0,
    "requests": {"received": 3, "live": 1, "replayed": 0, "outcomes": {"stop": 2}},
    "tokens": {"generated": 100, "drafted": 50, "accepted": 25, "per_second": 7.0},
    "memory": {"used_bytes": 1 << 30, "budget_bytes": 4 << 30},
    "models": {
        "m[x]": {
            "state": "ready",
            "memory_bytes": 1 << 30,
            "kv_bytes": 1 << 20,
            "running": 1,
            "waiting": 4,
            "generated_tokens": 100,
            "accepted_tokens": 25,
            "draft_tokens": 50,
            "speedup": 1.5,
            "restarts": 2,
        }
    },
}


def test_curve_goes_from_nothing_to_the_most() -> None:
    assert sparkline([0, 2, 4], 4) == " ▄█"
    assert sparkline([0, 4, 9], 4) == " ██"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""


def test_rate_is_that_between_two_looks_and_never_negative() -> None:
    history = History()
    for uptime_s, generated in ((10.0, 100), (12.0, 140), (1.0, 3), (2.0, 5)):  # the server was restarted
        history.add(STATS | {"uptime_s": uptime_s, "tokens": {"generated": generated}})
    assert list(history.tokens_per_s) == [20.0, 2.0]
    assert len(history.memory) == 4


def test_screen_shows_memory_tokens_acceptance_and_queue() -> None:
    history = History()
    history.add(STATS)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(STATS, history))
    text = console.export_text()
    for words in (
        "1.0 GiB of 4.0 GiB (25 %)",
        "7.0",
        "50 % of 50 drafted",
        "1 live, 0 replayed; 2 stop",
        "m[x]",
        "1.50",
    ):
        assert words in text
