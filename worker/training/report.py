"""The report that is kept with a head: all figures as JSON, and the curve of its training as a picture."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from worker.heads import folder
from worker.training.measure import Measured
from worker.training.plan import Plan
from worker.training.trainer import Point

PICTURE = "report.svg"
_EQUAL = 1.1  # times that differ by less count as equal
_PANEL, _HEIGHT, _EDGE = 480, 360, 48  # of the picture


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a build. Those of training are `reading_s`, the target's forwards over the text, which are timed by
    themselves now and then, and `passes_s`, all the rest: the head's passes, forth and back, and its steps. `making_s`
    went to the first rounds and steps, which make kernels, and is no part of the plan's minutes."""

    writing_s: float
    reading_s: float
    passes_s: float
    judging_s: float
    measuring_s: float
    making_s: float = 0.0  # older reports count it as training


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What counts of a trained drafter beside others; `speedup` is predicted, for one row, and 1 where none is gained.

    `minutes` are those that writing and training took.
    """

    name: str
    kind: str
    minutes: float
    accept_length: float
    speedup: float
    measured_on: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`is_used`: whether `auto` drafts with this head; false where it would not be faster.

    It was made on `device` and measured, the last time, on `measured_on`. Of the rows of text, `served_rows` are of
    kept text, and `answered_prompts` began with a training prompt. `others` had been made for the same model before.
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
    spent: Spent | None = None
    served_rows: int = 0
    answered_prompts: int = 0
    others: list[Figures] = []


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


def figures(report: Report, name: str) -> Figures:
    """A drafter's own figures."""
    greedy = next(one for one in report.measured.acceptance if one.text == folder.PROMPTS and one.temperature == 0.0)
    return Figures(
        name=name,
        kind=report.plan.init,
        minutes=round((report.writing_s + report.train_s) / 60, 2),
        accept_length=greedy.accept_length,
        speedup=report.measured.speedups[0],
        measured_on=report.measured_on,
    )


def others(target: str, own: Path) -> list[Figures]:
    """Figures of the drafters that there are for the target of this identity, but for the one in `own`."""
    found = []
    for entry in folder.entries():
        if entry.config.target == target and entry.folder != own:
            with contextlib.suppress(folder.BadHead):  # it has no report, or an old one
                found.append(figures(load(entry.folder), entry.name))
    return found


def comparison(report: Report, name: str) -> str:
    """A drafter beside the others for its model, and which of them wins, for people; "" where there are none."""
    if not report.others:
        return ""
    own = figures(report, name)
    entries = [own, *report.others]
    lines = ["drafter                          kind    minutes  accept length  predicted speed-up"]
    lines += [f"{f.name:32} {f.kind:6} {f.minutes:8.1f} {f.accept_length:14.2f} {f.speedup:19.2f}" for f in entries]
    best = max(entries, key=lambda f: (f.speedup, f.accept_length))
    times = [f.minutes for f in entries]
    how = ["at equal time" if max(times) <= _EQUAL * min(times) else "at unequal times"]
    how += ["measured on different devices"] if len({f.measured_on for f in entries}) > 1 else []
    return "\n".join([*lines, f"{best.name} ({best.kind}) wins, {', '.join(how)}"])


def history(report: Report) -> str:
    """How the training went and where the time went, for people."""
    lines = ["training s     tokens  accept length on held-out text"]
    lines += [f"{p.train_s:10.1f} {p.tokens:10}  {p.accept_length:13.2f}" for p in report.curve]
    if report.spent is not None:
        seconds = msgspec.structs.asdict(report.spent)
        total_s = sum(seconds.values()) or 1.0
        lines.append("time spent           s  share")
        lines += [f"{n.removesuffix('_s'):10} {s:11.1f} {s / total_s:6.0%}" for n, s in seconds.items() if s]
    return "\n".join(lines)


def picture(curve: Sequence[Point], title: str) -> str:
    """Accept length on held-out text against minutes of training, and against the tokens trained on, as SVG."""
    minutes = _panel(curve, [p.train_s / 60 for p in curve], "minutes of training", left=0)
    tokens = _panel(curve, [p.tokens / 1e6 for p in curve], "million tokens trained on", left=_PANEL)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _PANEL}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_EDGE}" y="24">Accept length on held-out text: {_escaped(title)}</text>{minutes}{tokens}</svg>\n'
    )


def _panel(curve: Sequence[Point], across: Sequence[float], unit: str, left: int) -> str:
    last = max(across, default=1.0) or 1.0
    top = max([point.accept_length for point in curve], default=2.0) * 1.1
    right, bottom = left + _PANEL - _EDGE, _HEIGHT - _EDGE

    def place(value: float, length: float) -> tuple[str, str]:
        x = left + _EDGE + (_PANEL - 2 * _EDGE) * value / last
        y = bottom - (_HEIGHT - 2 * _EDGE) * (length - 1.0) / max(top - 1.0, 0.1)
        return f"{x:.1f}", f"{y:.1f}"

    places = [place(value, point.accept_length) for value, point in zip(across, curve, strict=True)]
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3"><title>{value:.3g} {unit}: {point.accept_length}</title></circle>'
        for (x, y), value, point in zip(places, across, curve, strict=True)
    )
    return (
        f'<polyline fill="none" stroke="black" points="{" ".join(map(",".join, places))}"/>{dots}'
        f'<text x="{left + _EDGE}" y="{_HEIGHT - 16}">0</text>'
        f'<text x="{right}" y="{_HEIGHT - 16}" text-anchor="end">{last:.3g} {unit}</text>'
        f'<text x="{left + 8}" y="{bottom}">1.0</text><text x="{left + 8}" y="{_EDGE}">{top:.2f}</text>'
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
