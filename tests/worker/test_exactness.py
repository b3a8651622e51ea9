"""Speculation changes nothing but the time: the output is that of plain decoding, token for token."""

import random
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from common.sampling import Sampling, Speculation
from tests.worker import tiny
from worker.cache.attention import GPU_STYLE
from worker.drafters.suffix import SuffixDrafter
from worker.request import Request
from worker.sampling.tally import Tally

SAMPLINGS = {
    "greedy": Sampling(),
    "warm": Sampling(temperature=0.7, seed=11),
    "nucleus": Sampling(temperature=1.0, top_p=0.8, seed=12),
    "filtered": Sampling(temperature=1.3, top_k=9, min_p=0.02, top_p=0.95, seed=2**62 + 5),
    "greedy, penalized": Sampling(repetition_penalty=1.3, frequency_penalty=0.6),
    "penalized": Sampling(temperature=0.8, presence_penalty=1.5, frequency_penalty=-0.3, seed=13),
    "all": Sampling(
        temperature=1.0,
        top_p=0.9,
        seed=14,
        repetition_penalty=0.8,
        presence_penalty=-0.5,
        frequency_penalty=0.9,
        logit_bias=((5, 3.0), (17, -100.0), (60, 2.5)),
    ),
}

DRAFTERS = ("ngram", "suffix", "right", "half", "wrong", "noise", "twin", "stranger", "layers", "healed", "head")


@cache
def model(kind: str) -> Any:
    return tiny.make_model(kind)


def requests(sampling: Sampling, count: int = 8) -> list[Request]:
    return [tiny.make_request(i, sampling=sampling) for i in range(count)]


@cache
def alone(kind: str, name: str) -> dict[str, list[int]]:
    """What each request gives when it is decoded plainly, by itself."""
    outputs: dict[str, list[int]] = {}
    for request in requests(SAMPLINGS[name]):
        outputs |= tiny.finish(tiny.make_engine(model(kind)), [tiny.plain(request)])
    return outputs


def drafter(kind: str, name: str, expected: dict[str, list[int]], sampling: Sampling) -> Any:
    by_prompt = {request.prompt: expected[request.request_id] for request in requests(sampling)}
    return {
        "ngram": lambda: None,
        "suffix": lambda: SuffixDrafter(),
        "right": lambda: tiny.Oracle(by_prompt, wrong=0.0),
        "half": lambda: tiny.Oracle(by_prompt, wrong=0.4),
        "wrong": lambda: tiny.Oracle(by_prompt, wrong=1.0),
        "noise": lambda: tiny.Noise(),
        "twin": lambda: tiny.model_drafter(tiny.make_model(kind)),
        "stranger": lambda: tiny.model_drafter(tiny.make_model("llama", seed=9)),
        "layers": lambda: tiny.layers_drafter((0, 1)),
        "healed": lambda: tiny.healed_drafter(model(kind)),
        "head": lambda: tiny.head_drafter(model(kind)),
    }[name]()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafting", DRAFTERS)
def test_speculation_in_a_joining_batch_equals_plain_decoding_alone(kind: str, sampling: str, drafting: str) -> None:
    expected = alone(kind, sampling)
    engine = tiny.make_engine(model(kind), drafter(kind, drafting, expected, SAMPLINGS[sampling]))
    assert tiny.finish(engine, requests(SAMPLINGS[sampling]), random.Random(7)) == expected
    assert engine.totals.drafted > 0
    is_penalized = Tally.of(SAMPLINGS[sampling], 1) is not None  # what a drafter that computes does not look at
    if drafting == "right" or (drafting == "twin" and not is_penalized):
        assert engine.totals.accepted == engine.totals.drafted
    if drafting == "wrong":
        assert engine.totals.accepted == 0


@pytest.mark.parametrize("name", ["greedy, penalized", "penalized", "all"])
def test_penalties_and_biases_change_the_output(name: str) -> None:
    """Else the table above would prove nothing about them."""
    plain = Sampling(temperature=SAMPLINGS[name].temperature, top_p=SAMPLINGS[name].top_p, seed=SAMPLINGS[name].seed)
    assert tiny.finish(tiny.make_engine(model("llama")), requests(plain)) != alone("llama", name)


@pytest.mark.parametrize("width", range(1, 9))
def test_every_draft_length_gives_the_same_tokens(width: int) -> None:
    expected = alone("llama", "greedy")
    speculation = Speculation(max_draft_tokens=width)
    engine = tiny.make_engine(model("llama"), drafter("llama", "half", expected, Sampling()))
    batch = [tiny.make_request(i, speculation=speculation) for i in range(8)]
    assert tiny.finish(engine, batch) == expected


@pytest.mark.parametrize("chunk_tokens", [16, 24])
def test_prompts_in_chunks_among_decoding_rows_give_the_same_tokens(chunk_tokens: int) -> None:
    engine = tiny.make_engine(model("gemma3"), chunk_tokens=chunk_tokens)
    assert tiny.finish(engine, requests(SAMPLINGS["warm"]), random.Random(3)) == alone("gemma3", "warm")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_greedy_output_equals_that_of_mlx_lm(kind: str) -> None:
    expected = alone(kind, "greedy")
    for request in requests(Sampling()):
        theirs = generate_step(mx.array(request.prompt), model(kind), max_tokens=request.max_tokens)
        assert [int(token) for token, _ in theirs] == expected[request.request_id]


@pytest.mark.parametrize("sampling", ["greedy", "nucleus", "greedy, penalized", "all"])
def test_resuming_after_any_token_continues_the_same_output(sampling: str) -> None:
    expected = alone("llama", sampling)
    for request in requests(SAMPLINGS[sampling], 4):
        output = expected[request.request_id]
        for made in range(0, len(output) + 1, 5):
            resumed = tiny.make_request(
                int(request.request_id[1:]), sampling=request.sampling, resume=tuple(output[:made])
            )
            assert tiny.finish(tiny.make_engine(model("llama")), [resumed]) == {request.request_id: output}


@pytest.mark.parametrize("drafting", ["right", "half"])
def test_rows_of_every_kind_of_sampling_in_one_batch_keep_their_outputs(drafting: str) -> None:
    names = list(SAMPLINGS)
    expected = {f"r{i}": alone("llama", names[i % len(names)])[f"r{i}"] for i in range(8)}
    batch = [tiny.make_request(i, sampling=SAMPLINGS[names[i % len(names)]]) for i in range(8)]
    engine = tiny.make_engine(model("llama"), drafter("llama", drafting, expected, Sampling()))
    assert tiny.finish(engine, batch, random.Random(5)) == expected


def test_cancelled_neighbours_change_nothing() -> None:
    expected = alone("llama", "warm")
    engine = tiny.make_engine(model("llama"))
    kept, dropped = requests(SAMPLINGS["warm"])[:4], requests(SAMPLINGS["warm"])[4:]
    outputs: dict[str, list[int]] = {request.request_id: [] for request in kept}
    for request in [r for pair in zip(dropped, kept, strict=True) for r in pair]:
        engine.submit(request)
    steps = 0
    while engine.has_work:
        for gain in engine.step().gains:
            if gain.request_id in outputs:
                outputs[gain.request_id] += gain.tokens
        steps += 1
        if steps % 3 == 0 and dropped:
            engine.cancel(dropped.pop().request_id)
    assert outputs == {request.request_id: expected[request.request_id] for request in kept}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shapes_rounded_as_for_a_gpu_give_the_same_tokens(kind: str) -> None:
    expected = alone(kind, "warm")
    engine = tiny.make_engine(model(kind), drafter(kind, "half", expected, SAMPLINGS["warm"]), chunk_tokens=24)
    engine.target.state.style = GPU_STYLE
    assert tiny.finish(engine, requests(SAMPLINGS["warm"]), random.Random(5)) == expected


def test_another_seed_gives_another_output() -> None:
    one = tiny.finish(
        tiny.make_engine(model("llama")),
        [tiny.make_request(3, max_tokens=20, sampling=Sampling(temperature=1, seed=1))],
    )
    two = tiny.finish(
        tiny.make_engine(model("llama")),
        [tiny.make_request(3, max_tokens=20, sampling=Sampling(temperature=1, seed=2))],
    )
    assert one != two
