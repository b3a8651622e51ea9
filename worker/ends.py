"""How requests end: their usage, timings and last gain."""

from common.messages import Timings, Usage
from worker.report import Gain
from worker.request import Request, Row


def already_over(request: Request) -> str | None:
    """The finish of a resumed request whose last token had already been made."""
    if request.resume and request.resume[-1] in request.end_tokens:
        return "stop"
    return "length" if len(request.resume) >= request.max_tokens else None


def without_row(request: Request, reason: str) -> Gain:
    """The last gain of a request that never had a row."""
    usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=len(request.resume))
    return Gain(request.request_id, finish=reason, usage=usage, timings=Timings())


def usage_of(row: Row) -> Usage:
    """What a row took and gave."""
    return Usage(
        prompt_tokens=len(row.request.prompt),
        completion_tokens=row.output_tokens,
        cached_tokens=min(row.first_recalled, len(row.request.prompt)),
        drafted_tokens=row.drafted,
        accepted_tokens=row.accepted,
        steps=row.steps,
    )


def timings_of(row: Row, now_s: float, *, is_measured: bool) -> Timings:
    """Where a row's time went; `is_measured`: the time of plain steps is known."""
    first_s = row.first_token_s or now_s
    is_measured = is_measured and row.measured_decode_s > 0
    return Timings(
        queue_s=max(row.admitted_s - row.request.arrived_s, 0.0),
        prefill_s=first_s - row.admitted_s,
        decode_s=now_s - first_s,
        plain_decode_s=row.plain_decode_s if is_measured else None,
        measured_decode_s=row.measured_decode_s if is_measured else None,
    )
