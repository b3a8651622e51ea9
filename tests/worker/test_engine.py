"""The engine: ends, limits, and what one row's trouble does to the others."""

from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from common.errors import ContextLengthExceeded, InternalError, Overloaded
from common.sampling import Sampling, Speculation
from tests.worker import tiny
from worker.engine import Gain, Pace
from worker.request import Request
from worker.scheduler import Limits


@cache
def model() -> Any:
    return tiny.make_model("llama")


def gains_of(engine: Any) -> list[Gain]:
    return [gain for gain in engine.step().gains]


def run(engine: Any) -> list[Gain]:
    gains: list[Gain] = []
    while engine.has_work:
        gains += engine.step().gains
    return gains


def test_an_end_token_stops_the_row_inside_an_accepted_draft() -> None:
    request = tiny.make_request(2, max_tokens=25)
    output = tiny.finish(tiny.make_engine(model()), [request])["r2"]
    end = output[10]
    cut = output.index(end) + 1
    stopping = tiny.make_request(2, max_tokens=25, end_tokens=frozenset({end}))
    for drafter in (None, tiny.Oracle({request.prompt: output}, wrong=0.0)):
        engine = tiny.make_engine(model(), drafter)
        gains = run_submitted(engine, stopping)
        assert [t for g in gains for t in g.tokens] == output[:cut]
        assert gains[-1].finish == "stop"
        assert gains[-1].usage is not None and gains[-1].usage.completion_tokens == cut


def run_submitted(engine: Any, *requests: Request) -> list[Gain]:
    for request in requests:
        engine.submit(request)
    return run(engine)


def test_usage_counts_what_was_done() -> None:
    request = tiny.make_request(4, max_tokens=20)
    output = tiny.finish(tiny.make_engine(model()), [request])["r4"]
    engine = tiny.make_engine(model(), tiny.Oracle({request.prompt: output}, wrong=0.0))
    gains = run_submitted(engine, request)
    usage, timings = gains[-1].usage, gains[-1].timings
    assert usage is not None and timings is not None
    assert usage.completion_tokens == 20
    assert usage.drafted_tokens == usage.accepted_tokens == sum(g.accepted for g in gains)
    assert usage.steps == len(gains) < 6
    assert usage.completion_tokens == usage.accepted_tokens + usage.steps
    assert timings.plain_decode_s is not None and timings.measured_decode_s is not None


def test_speculation_can_be_off_for_one_row_and_on_for_another() -> None:
    requests = [tiny.make_request(i, max_tokens=20) for i in (1, 2)]
    expected = tiny.finish(tiny.make_engine(model()), requests)
    oracle = tiny.Oracle({r.prompt: expected[r.request_id] for r in requests}, wrong=0.0)
    engine = tiny.make_engine(model(), oracle)
    gains = run_submitted(engine, requests[0], tiny.plain(requests[1]))
    assert sum(g.drafted for g in gains if g.request_id == "r1") > 0
    assert sum(g.drafted for g in gains if g.request_id == "r2") == 0


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_request_bounds_its_draft_length(limit: int) -> None:
    request = tiny.make_request(4, max_tokens=20, speculation=Speculation(max_draft_tokens=limit))
    output = tiny.finish(tiny.make_engine(model()), [request])["r4"]
    engine = tiny.make_engine(model(), tiny.Oracle({request.prompt: output}, wrong=0.0))
    assert max(g.drafted for g in run_submitted(engine, request)) == limit


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_request_frees_its_row_at_once(steps: int) -> None:
    engine = tiny.make_engine(model(), rows=1)
    engine.submit(tiny.make_request(1, max_tokens=25))
    engine.submit(tiny.make_request(2, max_tokens=25))
    for _ in range(steps):
        engine.step()
    (gain,) = engine.cancel("r1")
    assert gain.finish == "cancelled"
    assert all(row.request.request_id != "r1" for row in engine.rows)
    assert all(length == 0 for length in engine.target.state.lengths) or not steps
    assert {g.request_id for g in run(engine)} == {"r2"}
    assert engine.cancel("r1") == []


def test_a_row_that_was_never_fed_can_be_cancelled() -> None:
    prompt = tuple(7 * i % tiny.VOCABULARY for i in range(200))
    engine = tiny.make_engine(model(), chunk_tokens=16, prefix_bytes=1 << 20)
    for i in range(5):  # all but the first wait for it to read what they share
        engine.submit(Request(f"r{i}", (*prompt, i), Sampling(), 3))
    engine.step()
    assert engine.target.state.slots == 1
    assert engine.cancel("r4")[0].finish == "cancelled"
    assert {gain.request_id for gain in run(engine)} == {"r0", "r1", "r2", "r3"}


def test_the_cache_is_given_back_when_the_last_row_is_done() -> None:
    engine = tiny.make_engine(model())
    run_submitted(engine, tiny.make_request(1))
    engine.step()
    assert engine.target.kv_bytes == 0


def test_a_full_queue_refuses_and_says_how_full() -> None:
    engine = tiny.make_engine(model())
    engine.limits = Limits(rows=1, waiting=2, kv_bytes=None, kv_bytes_per_token=1)
    for i in range(2):
        engine.submit(tiny.make_request(i))
    with pytest.raises(Overloaded, match="limit is 2"):
        engine.submit(tiny.make_request(3))


def test_a_request_larger_than_the_cache_is_refused() -> None:
    engine = tiny.make_engine(model())
    engine.limits = Limits(rows=4, waiting=9, kv_bytes=300, kv_bytes_per_token=1)
    with pytest.raises(ContextLengthExceeded, match="300 bytes"):
        engine.submit(tiny.make_request(1, max_tokens=600))


def test_a_row_without_finite_logits_fails_alone_and_leaves_a_clean_slot() -> None:
    poison = tiny.VOCABULARY - 1
    broken = tiny.make_model("llama")
    table = broken.model.embed_tokens.weight
    table[poison] = mx.nan
    broken.model.embed_tokens.weight = table
    # The tied vocabulary projection must stay finite: only feeding the token is poisonous.
    broken.args.tie_word_embeddings = False
    broken.lm_head = tiny.make_model("llama").model.embed_tokens.as_linear
    healthy = tiny.make_request(1, max_tokens=12)
    expected = tiny.finish(tiny.make_engine(broken), [healthy])
    engine = tiny.make_engine(broken, rows=2)
    bad = Request(request_id="bad", prompt=(3, poison, 4), sampling=Sampling(), max_tokens=9)
    later = tiny.make_request(1, max_tokens=12, request_id="later")
    gains = run_submitted(engine, bad, healthy, later)
    assert [type(g.error) for g in gains if g.request_id == "bad"] == [InternalError]
    for name in ("r1", "later"):
        assert [t for g in gains if g.request_id == name for t in g.tokens] == expected["r1"]


def test_resuming_a_request_that_was_complete_ends_at_once() -> None:
    engine = tiny.make_engine(model())
    done = tiny.make_request(1, max_tokens=3, resume=(1, 2, 3))
    stopped = tiny.make_request(2, max_tokens=9, resume=(1, 7), end_tokens=frozenset({7}))
    gains = run_submitted(engine, done, stopped)
    assert [(g.request_id, g.finish, g.tokens) for g in gains] == [("r1", "length", ()), ("r2", "stop", ())]


def test_waiting_requests_get_rows_in_order_of_arrival() -> None:
    engine = tiny.make_engine(model(), rows=2)
    for i in range(5):
        engine.submit(tiny.make_request(i, max_tokens=4))
    ends = [g.request_id for g in run(engine) if g.finish]
    assert sorted(ends) == [f"r{i}" for i in range(5)]
    assert ends.index("r4") > ends.index("r0")


@pytest.mark.parametrize(
    ("decoding", "prefilling", "step_s", "seconds"),
    [
        (0, 1, 0.01, 0.8),
        (0, 2, 0.01, 0.3),
        (0, 2, 0.12, 0.72),
        (16, 1, 0.01, 0.1),
        (8, 2, 0.01, 0.2),
        (1, 1, 0.01, 0.3),
        (1, 50, 0.01, 0.3),
        (8, 1, 0.12, 0.24),
        (8, 2, 0.12, 0.48),
        (32, 1, 0.5, 0.8),
    ],
)
def test_prompts_get_more_time_the_more_wait_for_a_first_token_and_the_slower_steps_are(
    decoding: int, prefilling: int, step_s: float, seconds: float
) -> None:
    assert Pace().chunk_time(decoding, prefilling, step_s) == pytest.approx(seconds)


def test_a_long_prompt_is_fed_in_chunks_while_others_decode() -> None:
    engine = tiny.make_engine(model(), chunk_tokens=16)
    engine.submit(tiny.make_request(1, max_tokens=25))
    engine.step()
    prompt = tuple(i % tiny.VOCABULARY for i in range(300))
    engine.submit(Request(request_id="long", prompt=prompt, sampling=Sampling(), max_tokens=2))
    reports = []
    while engine.has_work:
        reports.append(engine.step())
    chunks = [r.prefill_tokens for r in reports if r.prefill_tokens]
    assert sum(chunks) == 300
    assert len(chunks) > 3
    assert any(g.request_id == "r1" for r in reports if r.prefill_tokens for g in r.gains)
