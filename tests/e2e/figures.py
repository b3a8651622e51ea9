"""The figures that the server holds itself to, by name, and what a run has measured of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

GOALS = {
    "R1": "kill -9 of the only worker under 8 clients: no request fails",
    "R2": "a replayed text, streamed or not, is that of the undisturbed run",
    "R3": "a death is noticed within 100 ms",
    "R4": "a hang is noticed within max(10 s, 3 x the slowest step); no false alarm",
    "R5": "from death to the first replayed token: load time + 3 s",
    "R6": "a poison request fails alone after its 2nd death; at most 3 replays",
    "R7": "restarts: 3 at once, then 1 to 60 s with jitter, for ever",
    "R8": "a client that leaves frees its row within 1 step or 1 prefill chunk",
    "R9": "SIGTERM: not ready at once, drain within 30 s, exit 0",
    "R10": "supervisor SIGKILLed: no process is left after 2 s, the next start works",
    "R11": "router SIGKILLed: models stay loaded, a new router serves within 1 s",
    "R12": "a loop of kills: no wrong byte, hung client, leaked file or process",
    "R13": "schemathesis, right and wrong requests: no 5xx, no dead worker",
    "R14": "overload: 429 or 503 with Retry-After within 50 ms",
    "R15": "a soak's footprint grows by max(1 %, 64 MB) at most; files and threads stay",
    "R16": "memory stays below 95 % of the budget; an unload gives back 98 % within 5 s",
    "R17": "1,000 slow-loris sockets: a healthy client's TTFT p99 grows by 10 % at most",
    "E1": "100 clients with mixed lengths, samplers and drafters: each gets its solo output",
}


@dataclass(slots=True)
class Figures:
    """What was measured, by the name of the goal."""

    measured: dict[str, list[str]] = field(default_factory=dict)

    def note(self, name: str, text: str) -> None:
        """Say what was measured of a goal; to be called before it is asserted, so that a miss is seen too."""
        assert name in GOALS
        self.measured.setdefault(name, []).append(text)

    def rows(self) -> Iterator[Sequence[str]]:
        """(name, goal, measured) of each goal that this run has touched."""
        for name, goal in GOALS.items():
            if name in self.measured:
                yield name, goal, "; ".join(self.measured[name])


FIGURES = Figures()
