"""`mlxspec top`: what a running server does, live: models, memory against the budget, tokens, acceptance, queue."""

import argparse
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from common.errors import InvalidValue
from router.cli.client import Client, connect
from router.cli.output import ExitStatus, NoServer, Output
from router.cli.verbs import SERVER, Verbs, add_server, number
from router.units import age, in_binary_units

HISTORY = 60
BARS = " ▁▂▃▄▅▆▇█"


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "top",
        topic=SERVER,
        help="watch the server live: models, memory, tokens, acceptance, queue",
        description="Watch the server live until Ctrl-C. Without a terminal, or with --once, it is shown once.",
        examples="mlxspec top\nmlxspec top --every 5",
        run=watch,
    )
    parser.add_argument("--every", type=number, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    add_server(parser)


class History:
    """What the curves show: used memory and tokens a second at each look."""

    def __init__(self) -> None:
        self.memory: deque[float] = deque(maxlen=HISTORY)
        self.tokens_per_s: deque[float] = deque(maxlen=HISTORY)
        self._before: tuple[float, float] | None = None

    def add(self, stats: dict[str, Any]) -> None:
        """Take in one answer of /stats; the rate is that since the one before, and after a restart none."""
        now_s, tokens = stats["uptime_s"], stats["tokens"]["generated"]
        if self._before and now_s > self._before[0]:
            self.tokens_per_s.append(max(0.0, (tokens - self._before[1]) / (now_s - self._before[0])))
        self._before = (now_s, tokens)
        self.memory.append(stats["memory"]["used_bytes"])


def watch(options: argparse.Namespace, output: Output) -> int:
    if not options.every > 0:
        raise InvalidValue(f"--every is {options.every:g}; it must be positive")
    client, history = connect(options), History()
    if output.is_json:
        output.json(client.get("/stats"))
        return ExitStatus.OK
    if options.once or not output.is_terminal:
        output.console.print(_look(client, history))
        return ExitStatus.OK
    with Live(_look(client, history), console=output.console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(max(0.1, options.every))
            try:
                view = _look(client, history)
            except NoServer as error:  # it may come back
                view = Text(error.message, style="bold red")
            live.update(view, refresh=True)


def _look(client: Client, history: History) -> RenderableType:
    stats = client.get("/stats")
    history.add(stats)
    return render(stats, history)


def render(stats: dict[str, Any], history: History) -> RenderableType:
    """The whole screen, of one answer of /stats."""
    memory, requests, tokens = stats["memory"], stats["requests"], stats["tokens"]
    used, budget = memory["used_bytes"], memory["budget_bytes"]
    rate = history.tokens_per_s[-1] if history.tokens_per_s else tokens["per_second"]
    accepted = share(tokens["accepted"], tokens["drafted"])
    ends = ", ".join(f"{count} {name}" for name, count in sorted(requests["outcomes"].items())) or "none ended yet"
    lines = Table.grid(padding=(0, 2))
    for name, value, curve in (
        (
            "memory",
            f"{in_binary_units(used)} of {in_binary_units(budget)} ({share(used, budget)})",
            sparkline(history.memory, budget),
        ),
        ("tokens/s", f"{rate:.1f}", sparkline(history.tokens_per_s)),
        ("accepted", f"{accepted} of {tokens['drafted']} drafted", ""),
        ("requests", f"{requests['live']} live, {requests['replayed']} replayed; {ends}", ""),
    ):
        lines.add_row(Text(name, style="bold"), Text(value), Text(curve, style="cyan"))
    head = Text(f"mlxspec {stats['version']}, up {age(stats['uptime_s'])}", style="bold")
    return Group(head, lines, Text(), _models(stats["models"]))


def _models(models: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("MODEL", "STATE", "MEMORY", "KV", "RUNNING", "WAITING", "TOKENS", "ACCEPTED", "SPEEDUP", "RESTARTS"):
        table.add_column(column, justify="left" if column in ("MODEL", "STATE") else "right")
    for name, model in models.items():
        table.add_row(
            escape(name),
            model["state"],
            in_binary_units(model["memory_bytes"]),
            in_binary_units(model["kv_bytes"]),
            str(model["running"]),
            str(model["waiting"]),
            str(model["generated_tokens"]),
            share(model["accepted_tokens"], model["draft_tokens"]),
            f"{model['speedup']:.2f}" if "speedup" in model else "-",
            str(model["restarts"]),
            style="" if model["state"] == "ready" else "dim",
        )
    return table


def sparkline(values: Sequence[float], most: float = 0.0) -> str:
    """A curve of one line, from 0 to `most`, or to the highest value."""
    top = most or max(values, default=0.0)
    steps = len(BARS) - 1
    return "".join(BARS[min(steps, round(value / top * steps))] if top else BARS[0] for value in values)


def share(part: float, whole: float) -> str:
    """A part in per cent."""
    return f"{100 * part / whole:.0f} %" if whole else "-"
