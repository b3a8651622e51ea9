"""Rows that lose their slots for want of memory: nobody sees it but by the time that it takes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from common.messages import Usage
from common.priority import Priority
from common.sampling import Sampling
from tests.worker import families, tiny
from worker.cache.layout import Segment
from worker.engine import Engine
from worker.report import Gain
from worker.request import Request
from worker.sampling.logprobs import Logprob
from worker.scheduler import Limits
from worker.target import Target
from worker.waiting import WaitingList

SAMPLINGS = {
    "greedy": Sampling(),
    "warm": Sampling(temperature=0.8, top_p=0.95, seed=21),
    "penalized": Sampling(temperature=0.8, presence_penalty=1.5, frequency_penalty=-0.3, seed=13),
}
KINDS = ("llama", "gemma3", "qwen3_next")


@cache
def model(kind: str) -> Any:
    return families.make_model(kind) if kind in families.CONFIGS else tiny.make_model(kind)


@cache
def size(kind: str) -> Any:
    return Target(model(kind)).measure_kv()


def requests(sampling: Sampling, count: int = 6, **changes: Any) -> list[Request]:
    return [tiny.make_request(i, sampling=sampling, **changes) for i in range(count)]


@cache
def alone(kind: str, name: str) -> dict[str, list[int]]:
    """What each request gives when it is decoded plainly, by itself."""
    outputs: dict[str, list[int]] = {}
    engine = tiny.make_engine(model(kind))
    for request in requests(SAMPLINGS[name]):
        outputs |= tiny.finish(engine, [tiny.plain(request)])
    return outputs


def drafter(name: str, kind: str, expected: dict[str, list[int]]) -> Any:
    by_prompt = {request.prompt: expected[request.request_id] for request in requests(Sampling())}
    return {
        "ngram": lambda: None,
        "half": lambda: tiny.Oracle(by_prompt, 0.4),
        "twin": lambda: tiny.model_drafter(tiny.make_model("llama")),
        "layers": lambda: tiny.layers_drafter((0, 1)),
    }[name]()


def limit(engine: Engine, kind: str, slots: float, tokens: int = 256) -> int:
    """Give an engine room for so many slots; returns the bytes."""
    per_token, per_row = size(kind).per_token, size(kind).per_row
    kv_bytes = int(slots * (tokens * per_token + per_row))
    engine.limits = Limits(8, 1000, kv_bytes, per_token, per_row)
    return kv_bytes


def run(
    engine: Engine, batch: Sequence[Request], before_step: Callable[[int], None] = lambda step: None
) -> dict[str, list[int]]:
    """Run requests that join one by one; returns each one's output. Checks that each ends once, with its own usage."""
    outputs: dict[str, list[int]] = {request.request_id: [] for request in batch}
    ended: dict[str, Usage | None] = {}
    queue = list(batch)
    for step in range(10_000):
        if queue and step % 2 == 0:
            engine.submit(queue.pop(0))
        before_step(step)
        for gain in engine.step().gains:
            assert gain.request_id not in ended and gain.error is None
            outputs[gain.request_id] += gain.tokens
            if gain.finish:
                ended[gain.request_id] = gain.usage
        if not queue and not engine.has_work:
            break
    for request in batch:
        usage = ended[request.request_id]
        assert usage is not None
        assert usage.prompt_tokens == len(request.prompt)
        assert usage.completion_tokens == len(outputs[request.request_id])
    assert engine.totals.prompt_tokens == sum(len(request.prompt) for request in batch)
    assert engine.totals.generated == sum(map(len, outputs.values()))
    assert engine.totals.finished == len(batch)
    return outputs


def preempting(engine: Engine, seed: int, chance: float = 0.3) -> Callable[[int], None]:
    """Takes the slots of rows at random."""
    source = random.Random(seed)

    def before_step(_: int) -> None:
        for row in list(engine.rows):
            if source.random() < chance and engine.totals.preempted < 60:
                engine._preempt(row, engine.clock())

    return before_step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafting", ["ngram", "half"])
@pytest.mark.parametrize("chunk_tokens", [None, 16])
def test_rows_preempted_at_any_step_give_the_same_tokens(
    kind: str, sampling: str, drafting: str, chunk_tokens: int | None
) -> None:
    expected = alone(kind, sampling)
    engine = tiny.make_engine(model(kind), drafter(drafting, kind, expected), chunk_tokens=chunk_tokens)
    assert run(engine, requests(SAMPLINGS[sampling]), preempting(engine, seed=5)) == expected
    assert engine.totals.preempted > 10


@pytest.mark.parametrize("drafting", ["twin", "layers"])
def test_drafters_that_compute_follow_rows_that_come_go_and_move(drafting: str) -> None:
    expected = alone("llama", "warm")
    engine = tiny.make_engine(model("llama"), drafter(drafting, "llama", expected))
    limit(engine, "llama", 3)
    assert run(engine, requests(SAMPLINGS["warm"]), preempting(engine, seed=6, chance=0.1)) == expected
    assert engine.totals.preempted > 0
    assert engine.totals.accepted > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", ["greedy", "warm"])
@pytest.mark.parametrize("drafting", ["ngram", "half"])
def test_a_limit_that_falls_and_rises_is_kept_at_every_step(kind: str, sampling: str, drafting: str) -> None:
    expected = alone(kind, sampling)
    engine = tiny.make_engine(model(kind), drafter(drafting, kind, expected))
    source = random.Random(3)

    def change_limit(step: int) -> None:
        if step:
            assert engine.limits.kv_bytes is None or engine.target.kv_bytes <= engine.limits.kv_bytes
        if step % 3 == 0:
            limit(engine, kind, source.randrange(1, 6))

    assert run(engine, requests(SAMPLINGS[sampling]), change_limit) == expected
    assert engine.totals.preempted > 0


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
def test_rows_that_grow_beyond_the_memory_are_preempted_and_all_end(prefix_bytes: int) -> None:
    batch = [tiny.make_request(i, max_tokens=500, sampling=SAMPLINGS["warm"]) for i in range(5)]
    engine = tiny.make_engine(model("llama"))
    expected: dict[str, list[int]] = {}
    for request in batch:
        expected |= tiny.finish(engine, [tiny.plain(request)])
    engine = tiny.make_engine(model("llama"), prefix_bytes=prefix_bytes)
    kv_bytes = limit(engine, "llama", 4, 512)
    most_rows = 0

    def check(_: int) -> None:
        nonlocal most_rows
        most_rows = max(most_rows, len(engine.rows))
        assert engine.target.kv_bytes + engine.prefixes.tree.nbytes <= kv_bytes

    assert run(engine, batch, check) == expected
    assert most_rows == 4  # by what they may come to need at most, two would fit
    assert 0 < engine.totals.preempted < 10


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_wait_for_one_that_reads_the_same_outlive_its_preemption(seed: int) -> None:
    shared = tuple(7 * i % tiny.VOCABULARY for i in range(150))
    batch = [Request(f"r{i}", (*shared, *range(i, 18 * i)), SAMPLINGS["warm"], 12) for i in range(6)]
    expected: dict[str, list[int]] = {}
    for request in batch:
        expected |= tiny.finish(tiny.make_engine(model("llama")), [tiny.plain(request)])
    engine = tiny.make_engine(model("llama"), chunk_tokens=16, prefix_bytes=1 << 20)
    source, preempt = random.Random(seed), preempting(engine, seed, chance=0.15)

    def before_step(step: int) -> None:
        preempt(step)
        limit(engine, "llama", source.randrange(2, 9))
        if seed % 2:
            engine.prefixes.fit(0, 0)  # nothing of what was read is found again

    assert run(engine, batch, before_step) == expected
    assert engine.totals.preempted > 3


def test_a_row_that_is_alone_goes_on_beyond_a_lower_limit() -> None:
    request = tiny.make_request(1, max_tokens=300)
    expected = tiny.finish(tiny.make_engine(model("llama")), [request])
    engine = tiny.make_engine(model("llama"))

    def lower(step: int) -> None:
        if step == 3:
            engine.set_kv_limit(1)

    limit(engine, "llama", 4)
    assert run(engine, [request], lower) == expected
    assert engine.totals.preempted == 0


def test_the_lowest_class_and_in_it_the_youngest_gives_way() -> None:
    engine = tiny.make_engine(model("llama"))
    classes = (Priority.NORMAL, Priority.LOW, Priority.HIGH, Priority.LOW, Priority.NORMAL)
    for i, priority in enumerate(classes):
        engine.submit(tiny.make_request(i, max_tokens=60, priority=priority))
        engine.step()
    left = []
    for slots in (4, 3, 2, 1):
        before = {row.id for row in engine.rows}
        limit(engine, "llama", slots)
        engine.step()
        left += sorted(before - {row.id for row in engine.rows})
    assert left == ["r3", "r1", "r4", "r0"]
    assert [one.request.request_id for one in engine.waiting.in_order(engine.clock())] == ["r0", "r4", "r1", "r3"]


def test_a_preempted_row_can_be_cancelled_while_it_waits() -> None:
    engine = tiny.make_engine(model("llama"))
    for i in range(2):
        engine.submit(tiny.make_request(i, max_tokens=60))
    gains = [gain for _ in range(5) for gain in engine.step().gains]
    limit(engine, "llama", 1)
    gains += engine.step().gains
    assert [one.request.request_id for one in engine.waiting] == ["r1"]
    (end,) = engine.cancel("r1")
    made = sum(len(gain.tokens) for gain in gains if gain.request_id == "r1")
    assert end.finish == "cancelled" and end.usage is not None and end.usage.completion_tokens == made > 0
    assert not engine.waiting and engine.cancel("r1") == []
    while engine.has_work:
        gains += engine.step().gains
    assert sum(len(gain.tokens) for gain in gains if gain.request_id == "r0") == 60


def test_the_time_without_a_slot_counts_as_waiting() -> None:
    now = 0.0
    engine = tiny.make_engine(model("llama"), rows=1)
    engine.clock = lambda: now
    first = tiny.make_request(1, max_tokens=4, arrived_s=0.0, speculation=tiny.plain(tiny.make_request(1)).speculation)
    engine.submit(first)
    now = 2.0
    engine.step()
    now = 3.0
    engine._preempt(engine.rows[0], now)
    now = 13.0
    timings = None
    while engine.has_work:
        for gain in engine.step().gains:
            timings = gain.timings
        now += 1.0
    assert timings is not None
    assert (timings.queue_s, timings.prefill_s) == (12.0, 0.0)
    assert timings.decode_s == 1.0 + 2.0


def test_a_preempted_rows_usage_tells_what_the_prefix_cache_gave_at_first() -> None:
    prompt = tuple(i % tiny.VOCABULARY for i in range(50))
    engine = tiny.make_engine(model("llama"), prefix_bytes=1 << 20)
    engine.submit(Request("a", prompt, Sampling(), 30))
    for _ in range(3):
        engine.step()
    engine._preempt(engine.rows[0], engine.clock())
    engine.step()
    assert engine.rows[0].recalled >= 50  # it had been kept
    gains = []
    while engine.has_work:
        gains += engine.step().gains
    assert gains[-1].usage is not None and gains[-1].usage.cached_tokens == 0


def test_slots_shrink_when_most_rows_have_left() -> None:
    engine = tiny.make_engine(model("llama"))
    limit(engine, "llama", 8)
    for i in range(8):
        engine.submit(tiny.make_request(i, max_tokens=5 if i else 100))
    engine.step()
    full = engine.target.kv_bytes
    while len(engine.rows) > 1:
        engine.step()
    engine.step()
    assert engine.rows and engine.target.kv_bytes * 8 == full


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_move_keep_what_they_have_read(kind: str) -> None:
    expected = alone(kind, "warm")
    engine = tiny.make_engine(model(kind), drafter("half", kind, expected))
    batch = requests(SAMPLINGS["warm"])
    outputs: dict[str, list[int]] = {request.request_id: [] for request in batch}
    for request in batch:
        engine.submit(request)
    while engine.has_work:
        for gain in engine.step().gains:
            outputs[gain.request_id] += gain.tokens
        if 0 < len(engine.rows) < engine.target.state.slots:
            read = [row.cached for row in engine.rows]
            engine.limits = replace(engine.limits, kv_bytes=1, kv_bytes_per_token=0, kv_bytes_per_row=0)
            engine.limits = replace(engine.limits, kv_bytes_per_row=1, kv_bytes=len(engine.rows))
            engine._shed(0.0)
            assert [row.cached for row in engine.rows] == read
            assert engine.target.state.slots == len(read)
    assert engine.totals.preempted == 0
    assert outputs == expected


# --- what else a row carries ------------------------------------------------------------------------------


def gains_by_request(engine: Engine, before_step: Callable[[int], None] = lambda step: None) -> dict[str, list[Gain]]:
    """Run what was submitted to its end."""
    gains: dict[str, list[Gain]] = {}
    step = 0
    while engine.has_work:
        before_step(step)
        for gain in engine.step().gains:
            gains.setdefault(gain.request_id, []).append(gain)
        step += 1
    return gains


def test_log_probabilities_come_once_with_their_tokens() -> None:
    told: list[dict[str, list[Logprob]]] = []
    for seed in (None, 1, 2):
        engine = tiny.make_engine(model("llama"))
        for request in requests(SAMPLINGS["warm"], 4, logprobs=2):
            engine.submit(request)
        gains = gains_by_request(engine, preempting(engine, seed) if seed else lambda step: None)
        told.append({name: [one for gain in own for one in gain.logprobs] for name, own in gains.items()})
        assert all(len(own) == sum(len(g.tokens) for g in gains[name]) for name, own in told[-1].items())
        assert (engine.totals.preempted > 0) == (seed is not None)
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_request_resumed_after_a_workers_death_can_be_preempted(sampling: str) -> None:
    expected = alone("llama", sampling)
    engine = tiny.make_engine(model("llama"))
    for i in range(6):
        made = tuple(expected[f"r{i}"][: len(expected[f"r{i}"]) // 2])
        engine.submit(tiny.make_request(i, sampling=SAMPLINGS[sampling], resume=made))
    gains = gains_by_request(engine, preempting(engine, seed=8))
    assert engine.totals.preempted > 0
    for name, output in expected.items():
        assert [token for gain in gains[name] for token in gain.tokens] == output[len(output) // 2 :]
        usage = gains[name][-1].usage
        assert usage is not None and usage.completion_tokens == len(output)


@pytest.mark.parametrize("kind", ["deepseek_v3", "mamba2", "rwkv7"])
def test_states_with_other_formulas_for_prompts_move_and_keep_the_limit(kind: str) -> None:
    """What is read again may differ by rounding there, so only lengths are compared."""
    engine = tiny.make_engine(model(kind))
    source = random.Random(4)

    def change_limit(step: int) -> None:
        assert step == 0 or engine.target.kv_bytes <= (engine.limits.kv_bytes or 0)
        if step % 3 == 0:
            limit(engine, kind, source.randrange(1, 6))

    outputs = run(engine, requests(SAMPLINGS["warm"]), change_limit)
    assert {name: len(tokens) for name, tokens in outputs.items()} == {
        request.request_id: request.max_tokens for request in requests(SAMPLINGS["warm"])
    }
    assert engine.totals.preempted > 0


# --- time and memory --------------------------------------------------------------------------------------


def test_a_low_request_ends_though_high_ones_never_stop_coming_and_memory_comes_and_goes() -> None:
    now = 0.0
    engine = tiny.make_engine(model("llama"), rows=2)
    engine.clock, engine.waiting = lambda: now, WaitingList(aging_s=10.0)
    engine.submit(tiny.make_request(0, max_tokens=20, priority=Priority.LOW))
    begun = ended = None
    for step in range(400):
        if step % 2 == 0:
            engine.submit(tiny.make_request(1, request_id=f"h{step}", max_tokens=5, priority=Priority.HIGH))
        limit(engine, "llama", 1 + step // 3 % 2)
        engine.limits = replace(engine.limits, rows=2)
        gains = {gain.request_id: gain for gain in engine.step().gains}
        begun = step if begun is None and "r0" in gains else begun
        if "r0" in gains and gains["r0"].finish:
            ended = step
            break
        now += 1.0
    assert begun is not None and ended is not None
    assert engine.totals.preempted > 0
    assert ended < 120


def test_memory_is_given_back_without_a_second_copy_of_the_cache() -> None:
    target = Target(model("llama"))
    target.state.longest_tokens = target.state.capacity_tokens = 20_000
    prompts = [[(7 * slot + i) % tiny.VOCABULARY for i in range(40)] for slot in range(4)]
    for slot, prompt in enumerate(prompts):
        mx.eval(target.forward([Segment(slot, 0, 40, True)], prompt, [0]), target.cached_arrays())
        target.state.commit(slot, 40)
    expected = target.forward([Segment(3, 40, 1)], [5], [0])
    mx.eval(expected, target.cached_arrays())
    target.state.commit(3, 40)
    large = target.kv_bytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    target.rearrange([1, 3], 10_240)
    assert target.kv_bytes == large * 2 * 10_240 // (4 * 20_000)
    assert mx.get_peak_memory() - before < large / 6  # there are three layers of keys and values
    assert mx.get_active_memory() <= before - (large - target.kv_bytes) + 4096
    logits = target.forward([Segment(1, 40, 1)], [5], [0])
    assert mx.array_equal(logits, expected)
