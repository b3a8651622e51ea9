"""The MLX thread's loop: each step's report is published once and in order, at once or while the next step runs."""

import queue

import pytest

from common.errors import ContextLengthExceeded
from tests.worker import tiny
from worker.engine import Engine
from worker.loop import Loop, Order, Pulse, Stop, Submit
from worker.report import StepReport
from worker.request import Request
from worker.scheduler import Limits

Event = tuple[str, int]


class Run:
    """A loop over some requests that ends with the last of them: what happened in which step, and what came of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, requests: list[Request], late: bool) -> None:
        self.events: list[Event] = []
        self.reports: list[StepReport] = []
        orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        for request in requests:
            orders.put(Submit(request))
        left = {request.request_id for request in requests}
        step = Engine.step

        def stepping(own: Engine) -> StepReport:
            self.events.append(("begin", own.totals.steps + 1))
            report = step(own)
            self.events.append(("end", report.step))
            return report

        def publish(report: StepReport) -> None:
            self.events.append(("publish", report.step))
            self.reports.append(report)
            left.difference_update(gain.request_id for gain in report.gains if gain.finish or gain.error)
            if not left:
                orders.put(Stop())

        monkeypatch.setattr(Engine, "step", stepping)
        Loop(engine, orders, publish, Pulse(), publishes_late=late).run()
        monkeypatch.undo()

    def tokens(self, request: Request) -> list[int]:
        gains = [gain for report in self.reports for gain in report.gains if gain.request_id == request.request_id]
        return [token for gain in gains for token in gain.tokens]


@pytest.mark.parametrize("late", [False, True])
def test_each_step_is_published_once_and_in_order(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    model = tiny.make_model("llama")
    requests = [tiny.make_request(number) for number in range(3)]
    run = Run(monkeypatch, tiny.make_engine(model), requests, late)
    for request in requests:
        assert run.tokens(request) == tiny.finish(tiny.make_engine(model), [request])[request.request_id]
    steps = max(step for _, step in run.events)
    assert [step for what, step in run.events if what == "publish"] == list(range(1, steps + 1))
    published = [run.events.index(("publish", step)) for step in range(1, steps)]
    begun = [run.events.index(("begin", step + 1)) for step in range(1, steps)]
    ended = [run.events.index(("end", step + 1)) for step in range(1, steps)]
    if late:
        assert all(begin < at < end for begin, at, end in zip(begun, published, ended, strict=True))
    else:
        assert all(at < begin for begin, at in zip(begun, published, strict=True))
    assert run.events[-1] == ("publish", steps), "nothing runs any more: the last report does not wait"


def test_who_is_refused_hears_of_it_though_no_step_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.make_engine(tiny.make_model("llama"))
    engine.limits = Limits(rows=8, waiting=1000, kv_bytes=10, kv_bytes_per_token=1)
    run = Run(monkeypatch, engine, [tiny.make_request(0, prompt=(1,) * 20)], late=True)
    assert isinstance(run.reports[0].gains[0].error, ContextLengthExceeded)
    assert not [what for what, _ in run.events if what != "publish"]
