"""Every way of keeping a state, packed, with drafts and rollbacks: the output is plain decoding's, token for token.

Bitwise on the reference BLAS, with one exception: chunks of prompts in layers with a chunked formula (`CHUNKED`), whose
results depend on where a prompt is cut, by rounding. Drafts are computed as plain decoding computes them in all.
"""

import random
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from common.sampling import Sampling, Speculation
from tests.worker import families, tiny
from worker import self_test
from worker.cache.layout import Segment
from worker.request import Request
from worker.target import Target

SAMPLINGS = {"greedy": Sampling(), "warm": Sampling(temperature=0.7, seed=11)}
KINDS = tuple(families.CONFIGS)
# State-space duality, lightning attention and latent attention have other formulas for more than one token.
CHUNKED = {
    "mamba2",
    "falcon_h1",
    "nemotron_h",
    "granitemoehybrid",
    "plamo2",
    "bailing_hybrid",
    "deepseek_v3",
    "deepseek_v32",
    "kimi_linear",
}


@cache
def model(kind: str) -> Any:
    return families.make_model(kind)


def requests(sampling: Sampling, count: int = 8) -> list[Request]:
    return [tiny.make_request(i, sampling=sampling) for i in range(count)]


@cache
def alone(kind: str, name: str) -> dict[str, list[int]]:
    """What each request gives when it is decoded plainly, by itself."""
    outputs: dict[str, list[int]] = {}
    engine = tiny.make_engine(model(kind))
    for request in requests(SAMPLINGS[name]):
        outputs |= tiny.finish(engine, [tiny.plain(request)])
    return outputs


def drafter(name: str, expected: dict[str, list[int]]) -> Any:
    by_prompt = {request.prompt: expected[request.request_id] for request in requests(Sampling())}
    wrong = {"right": 0.0, "half": 0.4, "wrong": 1.0}
    return None if name == "ngram" else tiny.Oracle(by_prompt, wrong[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampling", "drafting"), [("greedy", "ngram"), ("greedy", "half"), ("warm", "right"), ("warm", "wrong")]
)
def test_speculation_in_a_joining_batch_equals_plain_decoding_alone(kind: str, sampling: str, drafting: str) -> None:
    expected = alone(kind, sampling)
    engine = tiny.make_engine(model(kind), drafter(drafting, expected))
    assert tiny.finish(engine, requests(SAMPLINGS[sampling]), random.Random(7)) == expected
    if drafting != "ngram":
        assert engine.totals.drafted > 0
    if drafting == "right":
        assert engine.totals.accepted == engine.totals.drafted
    if drafting == "wrong":
        assert engine.totals.accepted == 0


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "falcon_h1", "lfm2", "deepseek_v3", "rwkv7", "jamba"])
def test_a_trained_head_drafts_for_other_states_too(kind: str) -> None:
    engine = tiny.make_engine(model(kind), tiny.head_drafter(model(kind)))
    assert tiny.finish(engine, requests(SAMPLINGS["warm"]), random.Random(7)) == alone(kind, "warm")
    assert engine.totals.drafted > 0


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_equals_that_of_mlx_lm(kind: str) -> None:
    expected = alone(kind, "greedy")
    for request in requests(Sampling(), 3):
        theirs = generate_step(mx.array(request.prompt), model(kind), max_tokens=request.max_tokens)
        assert [int(token) for token, _ in theirs] == expected[request.request_id]


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "deepseek_v32"])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_draft_length_gives_the_same_tokens(kind: str, width: int) -> None:
    expected = alone(kind, "greedy")
    engine = tiny.make_engine(model(kind), drafter("half", expected))
    batch = [tiny.make_request(i, speculation=Speculation(max_draft_tokens=width)) for i in range(4)]
    assert tiny.finish(engine, batch) == {request.request_id: expected[request.request_id] for request in batch}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - CHUNKED))
def test_prompts_in_chunks_among_decoding_rows_give_the_same_tokens(kind: str) -> None:
    engine = tiny.make_engine(model(kind), chunk_tokens=16)
    assert tiny.finish(engine, requests(SAMPLINGS["warm"], 4), random.Random(3)) == {
        request.request_id: alone(kind, "warm")[request.request_id] for request in requests(SAMPLINGS["warm"], 4)
    }


@pytest.mark.parametrize("kind", ["rwkv7", "recurrent_gemma", "deepseek_v3", "baichuan_m1"])
def test_cancelled_rows_leave_nothing_in_their_slots(kind: str) -> None:
    expected = alone(kind, "warm")
    engine = tiny.make_engine(model(kind), drafter("half", expected), rows=2)
    batch = requests(SAMPLINGS["warm"], 6)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in batch}
    for request in batch:
        engine.submit(request)
    for step in range(1000):
        for gain in engine.step().gains:
            outputs[gain.request_id] += gain.tokens
        if step == 2:
            cancelled = engine.cancel(engine.rows[0].request.request_id)[0].request_id
        if not engine.has_work:
            break
    assert expected[cancelled][: len(outputs[cancelled])] == outputs.pop(cancelled)
    assert outputs == {name: expected[name] for name in outputs}


def one_at_a_time(target: Target, prompt: list[int]) -> list[mx.array]:
    """Logits after each token of a prompt that is fed token by token, alone."""
    logits = []
    for at, token in enumerate(prompt):
        logits.append(target.forward([Segment(0, at, 1, True)], [token], [0])[0])
        mx.eval(logits[-1], target.cached_arrays())
        target.state.commit(0, at + 1)
    target.clear()
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_any_pieces_and_rollbacks_give_the_models_own_logits(kind: str) -> None:
    source = random.Random(1)
    prompts = [[source.randrange(tiny.VOCABULARY) for _ in range(n)] for n in (1, 40, 17)]
    theirs = [model(kind)(mx.array([prompt]), cache=make_prompt_cache(model(kind)))[0] for prompt in prompts]
    target, kept = Target(model(kind)), [0] * len(prompts)
    singly = [one_at_a_time(target, prompt) for prompt in prompts]
    while any(kept[row] < len(prompt) for row, prompt in enumerate(prompts)):
        segments = [
            Segment(row, kept[row], min(width, len(prompt) - kept[row]), source.random() < 0.3)
            for row, prompt in enumerate(prompts)
            if (width := source.randrange(9)) and kept[row] < len(prompt)
        ]
        if not segments:
            continue
        places = [(s.slot, s.start + i) for s in segments for i in range(s.width)]
        logits = target.forward(segments, [prompts[row][at] for row, at in places], range(len(places)))
        mx.eval(logits, target.cached_arrays())
        for got, (row, at) in zip(logits, places, strict=True):
            assert mx.allclose(got, theirs[row][at], atol=1e-4, rtol=1e-4)
            if kind not in CHUNKED:
                assert mx.array_equal(got, singly[row][at])
        for segment in segments:
            width = segment.width if segment.stands else source.randrange(segment.width + 1)
            kept[segment.slot] = segment.start + width
            target.state.commit(segment.slot, kept[segment.slot])


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_computed_bitwise_as_plain_decoding_computes_them(kind: str) -> None:
    """From the same prompt, with as many tokens at a time as may be, of which some are rolled back."""
    source = random.Random(5)
    text = [[source.randrange(tiny.VOCABULARY) for _ in range(n)] for n in (22, 34, 51)]
    plainly = decoded(kind, text, most=1)
    assert all(mx.array_equal(got, plainly[at]) for at, got in decoded(kind, text, most=5).items())


def decoded(kind: str, text: list[list[int]], most: int) -> dict[tuple[int, int], mx.array]:
    """Logits of all but each text's first tokens, fed up to `most` at a time after a prompt in one chunk."""
    source, target = random.Random(most), Target(model(kind))
    kept = [len(tokens) - 21 for tokens in text]
    logits: dict[tuple[int, int], mx.array] = {}
    feed(target, text, [Segment(row, 0, length, True) for row, length in enumerate(kept)])
    while any(kept[row] < len(tokens) for row, tokens in enumerate(text)):
        widths = [min(source.randrange(1, most + 1), len(tokens) - kept[row]) for row, tokens in enumerate(text)]
        segments = [Segment(row, kept[row], width, width == 1) for row, width in enumerate(widths) if width]
        given = feed(target, text, segments)
        for segment in segments:
            kept[segment.slot] += source.randrange(1, segment.width + 1)
            target.state.commit(segment.slot, kept[segment.slot])
            logits |= {(segment.slot, i): given[segment.slot, i] for i in range(segment.start, kept[segment.slot])}
    return logits


def feed(target: Target, text: list[list[int]], segments: list[Segment]) -> dict[tuple[int, int], mx.array]:
    """One step; commits all of it. Logits by row and position."""
    places = [(s.slot, s.start + i) for s in segments for i in range(s.width)]
    logits = target.forward(segments, [text[row][at] for row, at in places], range(len(places)))
    mx.eval(logits, target.cached_arrays())
    for segment in segments:
        target.state.commit(segment.slot, segment.end)
    return dict(zip(places, logits, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_self_test_accepts_the_model_with_speculation(kind: str) -> None:
    reference = self_test.reference_logits(model(kind))
    assert self_test.check(Target(model(kind)), reference) == ""
