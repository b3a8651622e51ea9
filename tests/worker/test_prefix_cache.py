"""The prefix cache in the engine: what is found again, what it costs, and that it changes no token."""

import random
from functools import cache
from typing import Any

import mlx.core as mx
import pytest

from common.config import Config, EngineConfig
from common.errors import InternalError
from common.sampling import Sampling
from tests.worker import tiny
from worker import prefix_cache, scheduler
from worker.assemble import _prefixes
from worker.cache.layout import Segment
from worker.cache.ragged import RaggedKVCache
from worker.cache.spans import joined
from worker.engine import Engine, Gain, Pace
from worker.request import Request, Row
from worker.scheduler import Limits
from worker.target import Target

PLENTY = 64 << 20


@cache
def model(kind: str = "llama") -> Any:
    return tiny.make_model(kind)


def engine_of(kind: str = "llama", prefix_bytes: int = PLENTY, **options: Any) -> Engine:
    return tiny.make_engine(model(kind), prefix_bytes=prefix_bytes, **options)


def slow_reader() -> Engine:
    """Reads some 40 tokens of prompts in a step."""
    engine = engine_of(chunk_tokens=40)
    engine.pace = Pace(chunk_alone_s=0.1)
    return engine


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(tiny.VOCABULARY) for _ in range(length))


def ask(prompt: tuple[int, ...], name: str = "r", max_tokens: int = 20, sampling: Sampling | None = None) -> Request:
    return Request(request_id=name, prompt=prompt, sampling=sampling or Sampling(), max_tokens=max_tokens)


def run(engine: Engine, *requests: Request) -> dict[str, list[Gain]]:
    for request in requests:
        engine.submit(request)
    gains: dict[str, list[Gain]] = {}
    while engine.has_work:
        for gain in engine.step().gains:
            gains.setdefault(gain.request_id, []).append(gain)
    return gains


def cached_tokens(gains: list[Gain]) -> int:
    usage = gains[-1].usage
    assert usage is not None
    return usage.cached_tokens


def tokens_of(gains: list[Gain]) -> list[int]:
    return [token for gain in gains for token in gain.tokens]


@cache
def alone(kind: str, request: Request) -> list[int]:
    return tiny.finish(tiny.make_engine(model(kind)), [tiny.plain(request)])[request.request_id]


# --- copying in and out of slots ------------------------------------------------------------------------


def fed(target: Target, slot: int, tokens: tuple[int, ...]) -> Any:
    logits = target.forward([Segment(slot, 0, len(tokens))], list(tokens), range(len(tokens)))
    mx.eval(logits, target.cached_arrays())
    target.state.commit(slot, len(tokens))
    return logits


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_span_continues_in_another_slot_as_in_its_own(kind: str) -> None:
    tokens = text(60)
    target = Target(model(kind))
    expected = fed(target, 0, tokens)
    whole = target.extract(0, 0, 50)
    mx.eval(whole.stacks)
    assert whole.nbytes == 50 * target.span_bytes_per_token
    first, rest = whole.split(20)
    assert (first.tokens, rest.tokens, first.nbytes + rest.nbytes) == (20, 30, whole.nbytes)
    fed(target, 1, text(30, seed=1))
    target.state.free(1)
    target.clear()
    target.insert(3, joined([(first, 20), (rest, 15)]))
    logits = target.forward([Segment(3, 35, 25)], list(tokens[35:]), range(25))
    assert mx.array_equal(logits, expected[35:])


def test_copies_do_not_make_steps_copy_the_slots() -> None:
    target = Target(model())
    target.state.longest_tokens = 40_000  # slots so large that a copy of them shows
    target.state.capacity_tokens = 40_000
    fed(target, 0, text(40))
    span = target.extract(0, 0, 40)
    mx.eval(span.stacks)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    logits = target.forward([Segment(0, 40, 1)], [1], [0])
    mx.eval(logits, target.cached_arrays())
    assert mx.get_peak_memory() - before < target.kv_bytes / 12  # less than one layer's keys


# --- what is found -----------------------------------------------------------------------------------------


def test_the_next_turn_of_a_chat_reads_only_what_is_new() -> None:
    engine = engine_of()
    history = text(40)
    for turn in range(4):
        gains = run(engine, ask(history, f"turn {turn}"))[f"turn {turn}"]
        # all of the last turn's prompt and output but its last token, whose keys were never computed
        assert cached_tokens(gains) == (len(history) - 6 if turn else 0)
        history = (*history, *tokens_of(gains), *text(5, seed=turn))
    assert (engine.prefixes.lookups, engine.prefixes.hits) == (4, 3)


def test_requests_at_once_read_a_shared_beginning_once() -> None:
    engine = engine_of()
    system = text(100)
    requests = [ask((*system, *text(20, seed=i)), f"r{i}") for i in range(1, 5)]
    steps = engine.totals.steps
    gains = run(engine, *requests)
    assert [cached_tokens(gains[f"r{i}"]) for i in range(1, 5)] == [0, 100, 100, 100]
    assert engine.totals.steps - steps < 2 + 21
    for request in requests:
        assert tokens_of(gains[request.request_id]) == alone("llama", request)


def test_a_row_waits_for_the_shared_part_only() -> None:
    engine = slow_reader()
    system = text(80)
    engine.submit(ask((*system, *text(1000, seed=1)), "long"))
    engine.submit(ask((*system, *text(10, seed=2)), "short"))
    engine.step()
    long, short = engine.rows
    while long.cached < 80:
        assert short.is_held and short.cached == 0
        engine.step()
    engine.step()
    assert not short.is_held
    assert short.recalled == 80
    assert not long.is_decoding


def test_when_the_row_that_reads_it_leaves_the_next_one_goes_on() -> None:
    engine = slow_reader()
    for i in range(3):
        engine.submit(ask(text(400), f"r{i}"))
    engine.step()
    first, second, third = engine.rows
    assert 0 < first.cached < 400
    assert (second.is_held, third.is_held) == (True, True)
    engine.cancel("r0")
    engine.step()
    assert second.recalled == first.cached < second.cached < 400
    assert third.is_held
    run(engine)
    assert third.recalled == 399


def test_a_hit_leaves_the_last_token_to_be_fed() -> None:
    engine = engine_of()
    first = run(engine, ask(text(50), "a"))["a"]
    second = run(engine, ask(text(50), "b"))["b"]
    assert cached_tokens(second) == 49
    assert tokens_of(first) == tokens_of(second)


def test_tiny_beginnings_are_neither_kept_nor_copied() -> None:
    engine = engine_of()
    run(engine, ask(text(prefix_cache.LEAST_TOKENS - 1), max_tokens=1))
    assert engine.prefixes.tree.nbytes == 0
    run(engine, ask(text(40), max_tokens=1))
    gains = run(engine, ask((*text(prefix_cache.LEAST_TOKENS - 1), 1, 2, 3), max_tokens=1))
    assert cached_tokens(gains["r"]) == 0


def test_a_resumed_request_finds_its_own_output() -> None:
    engine = engine_of()
    output = tokens_of(run(engine, ask(text(40), max_tokens=30))["r"])
    resumed = Request("again", text(40), Sampling(), max_tokens=30, resume=tuple(output[:20]))
    gains = run(engine, resumed)["again"]
    assert output[:20] + tokens_of(gains) == output
    assert cached_tokens(gains) == 40  # of the prompt; it found the output as well
    assert engine.prefixes.hit_tokens == 59


def test_without_a_budget_nothing_is_kept_or_counted() -> None:
    engine = engine_of(prefix_bytes=0)
    for _ in range(2):
        assert cached_tokens(run(engine, ask(text(60)))["r"]) == 0
    assert (engine.prefixes.lookups, engine.prefixes.tree.nbytes) == (0, 0)


# --- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("chunk_tokens", [None, 16])
@pytest.mark.parametrize("room", [PLENTY, 200])
def test_random_joins_with_hits_change_no_token(kind: str, chunk_tokens: int | None, room: int) -> None:
    """Conversations that share beginnings, in a batch; `room` in tokens where it is small: spans come and go."""
    source = random.Random(f"{kind} {chunk_tokens} {room}")
    engine = engine_of(kind, chunk_tokens=chunk_tokens, rows=4)
    if room < PLENTY:
        engine.prefixes.wanted_bytes = room * bytes_per_token(kind)
    systems = [text(n, seed=n) for n in (60, 90, 30)]
    requests = []
    for number in range(24):
        base = source.choice([*systems, *[(*r.prompt, *alone(kind, r)) for r in requests[-6:]]])
        prompt = (*base[: source.randrange(len(base) // 2, len(base) + 1)], *text(source.randrange(6), seed=number))
        sampling = Sampling(temperature=0.8, seed=number) if number % 2 else Sampling()
        requests.append(ask(prompt, f"r{number}", source.randrange(1, 24), sampling))
    expected = {request.request_id: alone(kind, request) for request in requests}
    assert tiny.finish(engine, requests, source) == expected
    assert engine.prefixes.hits > 1
    assert engine.prefixes.tree.nbytes == stored_bytes(engine)
    if room < PLENTY:
        assert engine.prefixes.tree.evictions > 1
        assert engine.prefixes.tree.nbytes <= room * bytes_per_token(kind)


@cache
def bytes_per_token(kind: str) -> int:
    return Target(model(kind)).measure_kv().per_token


def stored_bytes(engine: Engine) -> int:
    """Bytes of the arrays that the tree really holds."""
    total, seen = 0, set()
    for sequence in engine.prefixes.tree.sequences():
        for piece in engine.prefixes.tree.find(sequence):
            if id(piece.span) not in seen:
                seen.add(id(piece.span))
                total += sum(stack.nbytes for stack in piece.span.stacks)
    return total


def test_a_row_that_fails_is_not_kept() -> None:
    poison = tiny.VOCABULARY - 1
    broken = tiny.make_model("llama")
    table = broken.model.embed_tokens.weight
    table[poison] = mx.nan
    broken.model.embed_tokens.weight = table
    broken.args.tie_word_embeddings = False
    broken.lm_head = tiny.make_model("llama").model.embed_tokens.as_linear
    engine = tiny.make_engine(broken, prefix_bytes=PLENTY)
    healthy = tuple(token % poison for token in text(30))
    bad = run(engine, ask((*healthy, poison, 1), "bad"))["bad"]
    assert isinstance(bad[-1].error, InternalError)
    assert engine.prefixes.tree.nbytes == 0
    expected = tiny.finish(tiny.make_engine(broken), [ask(healthy)])
    assert tokens_of(run(engine, ask(healthy))["r"]) == expected["r"]


# --- memory ---------------------------------------------------------------------------------------------------


def test_rows_come_first_and_prefixes_give_way() -> None:
    per_token = bytes_per_token("llama")
    engine = engine_of()
    limit = 1024 * per_token
    engine.limits = Limits(rows=4, waiting=9, kv_bytes=limit, kv_bytes_per_token=per_token)
    for i in range(4):
        run(engine, ask(text(200, seed=i), f"r{i}"))
        assert engine.target.kv_bytes + engine.prefixes.tree.nbytes <= limit
    assert engine.prefixes.tree.nbytes > 600 * per_token
    engine.submit(ask(text(700, seed=9), "large", max_tokens=60))
    while engine.has_work:
        engine.step()
        assert engine.target.kv_bytes + engine.prefixes.tree.nbytes <= limit
    assert engine.prefixes.tree.evictions > 0
    assert engine.totals.finished == 5


def test_a_lower_limit_frees_prefixes_at_once() -> None:
    per_token = bytes_per_token("llama")
    engine = engine_of()
    for i in range(4):
        run(engine, ask(text(100, seed=i), f"r{i}"))
    assert engine.prefixes.tree.nbytes > 400 * per_token
    engine.set_kv_limit(150 * per_token)
    assert 0 < engine.prefixes.tree.nbytes <= 150 * per_token
    assert engine.target.kv_bytes == 0


@pytest.mark.parametrize(
    ("wanted", "limit", "slots", "expected"),
    [
        (None, None, 0, prefix_cache.USUAL_BYTES),
        (7, None, 99, 7),
        (None, 400, 100, 100),
        (None, 400, 350, 50),
        (300, 400, 0, 300),
        (300, 400, 200, 200),
        (300, 400, 500, 0),
        (0, 400, 0, 0),
    ],
)
def test_the_budget_is_what_is_wanted_and_left(
    wanted: int | None, limit: int | None, slots: int, expected: int
) -> None:
    assert prefix_cache.budget(wanted, limit, slots) == expected


def test_a_model_with_another_kind_of_state_keeps_no_prefixes() -> None:
    class Other(RaggedKVCache):
        pass

    target = Target(model())
    assert target.has_prefixes
    assert _prefixes(Config(), target).is_on
    assert not _prefixes(Config(engine=EngineConfig(prefix_cache=False)), target).is_on
    assert _prefixes(Config(engine=EngineConfig(prefix_cache_gb=0.5)), target).wanted_bytes == 1 << 29
    target.caches[1] = Other(target.state)
    assert not target.has_prefixes
    assert not _prefixes(Config(), target).is_on


# --- waiting for another row ------------------------------------------------------------------------------------


def row(tokens: tuple[int, ...], slot: int, cached: int = 0) -> Row:
    made = Row.of(ask(tokens), slot, 0.0)
    made.cached = cached
    return made


def test_only_a_long_beginning_that_another_row_has_is_waited_for() -> None:
    new = row(text(200), 9)
    reading, short = row((*text(150), 1, 2), 0, cached=30), row((*text(50), 1, 2), 1)
    assert scheduler.reader_ahead(new, [short, reading], 1000) == (reading, 150)
    assert scheduler.reader_ahead(new, [short], 1000) == (None, 0)
    assert scheduler.reader_ahead(new, [reading], 149) == (None, 0)
    decoding = row(text(150), 0, cached=149)
    assert scheduler.reader_ahead(new, [decoding], 1000) == (decoding, 150)
    assert scheduler.reader_ahead(new, [row(text(200), 0)], 1000)[1] == 199
