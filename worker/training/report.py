"""The report that is kept with a head: all figures as JSON, and the curve of its training as a picture."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from worker.heads import folder
from worker.training.measure import Measured
from worker.training.plan import Plan
from worker.training.trainer import Point

PICTURE = "report.svg"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`is_used`: whether `auto` drafts with this head; false where it would not be faster.

    It was made on `device` and measured, the last time, on `measured_on`.
    """

    is_used: bool
    model: str
    device: str
    command: str
    plan: Plan
    written_tokens: int
    written_rows: int
    writing_s: float
    train_s: float
    train_tokens: int
    steps: int
    curve: list[Point]
    measured: Measured
    measured_on: str = ""


def save(report: Report, to: Path) -> None:
    """Write both files into the head's folder."""
    folder.write(to / PICTURE, picture(report.curve, report.model).encode())
    folder.write(to / folder.REPORT, msgspec.json.format(msgspec.json.encode(report), indent=2))


def load(source: Path) -> Report:
    """Raises `BadHead`."""
    try:
        return msgspec.json.decode((source / folder.REPORT).read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise folder.BadHead(f"{source} has no report that can be read: {error}") from error


def summary(measured: Measured) -> str:
    """What was measured, for people."""
    lines = ["text      temperature  accept length  with copies  by position"]
    lines += [
        f"{a.text:9} {a.temperature:11.1f}  {a.accept_length:13.2f}  {a.copying:11.2f}  "
        + " ".join(f"{chance:.2f}" for chance in a.by_position)
        for a in measured.acceptance
    ]
    lines += [
        f"{cost.rows} rows: a step of {len(cost.step_s)} tokens costs {cost.step_s[-1] / cost.step_s[0]:.2f} "
        f"steps of one, a drafted token {cost.draft_s / cost.step_s[0]:.3f}; predicted speed-up {speedup:.2f}"
        for cost, speedup in zip(measured.costs, measured.speedups, strict=True)
    ]
    return "\n".join(lines)


def picture(curve: Sequence[Point], title: str) -> str:
    """Accept length on held-out text against seconds of training, as SVG."""
    width, height, edge = 640, 360, 48
    last_s = max([point.train_s for point in curve], default=1.0) or 1.0
    top = max([point.accept_length for point in curve], default=2.0) * 1.1

    def place(point: Point) -> str:
        x = edge + (width - 2 * edge) * point.train_s / last_s
        y = height - edge - (height - 2 * edge) * (point.accept_length - 1.0) / max(top - 1.0, 0.1)
        return f"{x:.1f},{y:.1f}"

    dots = "".join(
        f'<circle cx="{place(p).split(",")[0]}" cy="{place(p).split(",")[1]}" r="3"><title>{p.tokens} tokens: '
        f"{p.accept_length}</title></circle>"
        for p in curve
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{edge}" y="24">Accept length on held-out text: {_escaped(title)}</text>'
        f'<polyline fill="none" stroke="black" points="{" ".join(map(place, curve))}"/>{dots}'
        f'<text x="{edge}" y="{height - 16}">0 s</text>'
        f'<text x="{width - 2 * edge}" y="{height - 16}">{last_s:.0f} s</text>'
        f'<text x="8" y="{height - edge}">1.0</text><text x="8" y="{edge}">{top:.2f}</text></svg>\n'
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
