"""Log-probabilities on every surface: their shape, streamed and whole, and across a worker's death."""

import asyncio
import json
from typing import Any

import openai
import pytest

from common.messages import Delta, Deltas
from tests.fakes import FIRST_TOKEN_ID, Cluster, FakeWorker, finished, logprob, piece, wait_until, whole_text
from tests.router.client import post, received, replace_worker, stream

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/generate"
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "logprobs": True, "top_logprobs": 2},
    TEXT: {"prompt": "Hi", "logprobs": 2},
    NATIVE: {"prompt": "Hi", "logprobs": 2},
}


def chat_token(position: int) -> dict[str, Any]:
    text = piece(position)
    return {
        "token": text,
        "logprob": -0.5,
        "bytes": list(text.encode()),
        "top_logprobs": [
            {"token": text, "logprob": -0.5, "bytes": list(text.encode())},
            {"token": "\ufffd", "logprob": -9.0, "bytes": [0xC3]},
        ],
    }


def native_token(position: int) -> dict[str, Any]:
    token = chat_token(position)
    first, second = token["top_logprobs"]
    return token | {
        "token_id": FIRST_TOKEN_ID + position,
        "text_offset": len(whole_text(position)),
        "top_logprobs": [first | {"token_id": FIRST_TOKEN_ID + position}, second | {"token_id": 9}],
    }


def text_tokens(positions: range) -> dict[str, Any]:
    return {
        "tokens": [piece(p) for p in positions],
        "token_logprobs": [-0.5 for _ in positions],
        "top_logprobs": [{piece(p): -0.5, "bytes:\\xc3": -9.0} for p in positions],
        "text_offset": [len(whole_text(p)) for p in positions],
    }


async def test_chat_answer_has_them_for_each_token(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, CHAT, max_tokens=3, **BODIES[CHAT])
    assert answer["choices"][0]["logprobs"] == {"content": [chat_token(p) for p in range(3)], "refusal": None}
    assert worker.generates[0].logprobs == 2


async def test_chat_stream_has_them_beside_their_text(cluster: Cluster, worker: FakeWorker) -> None:
    chunks = await stream(cluster, CHAT, max_tokens=3, **BODIES[CHAT])
    first, *pieces, last = [chunk["choices"][0] for chunk in chunks]
    assert first["logprobs"] is None and last["logprobs"] is None
    for position, choice in enumerate(pieces):
        assert choice["delta"] == {"content": piece(position)}
        assert choice["logprobs"]["content"] == [chat_token(position)]


async def test_completion_has_four_lists(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, TEXT, max_tokens=3, **BODIES[TEXT])
    assert answer["choices"][0]["logprobs"] == text_tokens(range(3))


async def test_completion_stream_has_four_lists_a_chunk(cluster: Cluster, worker: FakeWorker) -> None:
    chunks = await stream(cluster, TEXT, max_tokens=3, **BODIES[TEXT])
    *pieces, last = [chunk["choices"][0] for chunk in chunks]
    assert [choice["logprobs"] for choice in pieces] == [text_tokens(range(p, p + 1)) for p in range(3)]
    assert last["logprobs"] is None


async def test_completion_with_zero_alternatives_has_the_tokens_own(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, TEXT, prompt="Hi", max_tokens=2, logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"0 ": -0.5}, {"1 ": -0.5}]


async def test_chat_without_top_logprobs_has_no_alternatives(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, CHAT, messages=HELLO, max_tokens=1, logprobs=True)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    assert (token["logprob"], token["top_logprobs"]) == (-0.5, [])
    assert worker.generates[0].logprobs == 0


async def test_generate_has_them_with_token_ids(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, NATIVE, max_tokens=3, **BODIES[NATIVE])
    assert answer["logprobs"] == [native_token(p) for p in range(3)]


async def test_generate_streams_them_once(cluster: Cluster, worker: FakeWorker) -> None:
    *pieces, last = await stream(cluster, NATIVE, max_tokens=3, **BODIES[NATIVE])
    assert pieces == [{"text": piece(p), "logprobs": [native_token(p)]} for p in range(3)]
    assert "logprobs" not in last


async def test_batch_has_them_for_each_prompt(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, "/batch_generate", prompts=["a", "b"], max_tokens=2, logprobs=2)
    assert [result["logprobs"] for result in answer["results"]] == [[native_token(0), native_token(1)]] * 2


@pytest.mark.parametrize("path", BODIES)
async def test_nobody_gets_them_unasked(cluster: Cluster, worker: FakeWorker, path: str) -> None:
    asked = {name: value for name, value in BODIES[path].items() if "logprobs" not in name}
    answer = await post(cluster, path, max_tokens=2, **asked)
    holder = answer if path == NATIVE else answer["choices"][0]
    assert holder.get("logprobs") is None
    assert worker.generates[0].logprobs is None


async def test_tokens_without_text_yet_are_told_at_once(cluster: Cluster, worker: FakeWorker) -> None:
    """A part of a character, or the end token: nothing to read, but a log-probability."""
    worker.hold_at = 0
    async with cluster.http.post(CHAT, json={"stream": True, "max_tokens": 2, **BODIES[CHAT]}) as response:
        await wait_until(lambda: worker.generates)
        request_id = worker.generates[0].request_id
        for position, text in enumerate(("", "é")):
            delta = Delta(request_id=request_id, token_ids=(position,), text=text, logprobs=(logprob(position, 2),))
            await worker.send(Deltas(step=1, items=(delta,)))
        await worker.send(finished(request_id, 2))
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert [(c["delta"], c["logprobs"]["content"]) for c in choices[1:3]] == [
        ({"content": ""}, [chat_token(0)]),
        ({"content": "é"}, [chat_token(1)]),
    ]


@pytest.mark.parametrize("path", BODIES)
async def test_none_is_lost_or_doubled_when_a_worker_dies(cluster: Cluster, worker: FakeWorker, path: str) -> None:
    worker.hold_at = 4
    whole = asyncio.create_task(post(cluster, path, max_tokens=9, **BODIES[path]))
    chunks = asyncio.create_task(stream(cluster, path, max_tokens=9, **BODIES[path]))
    await wait_until(lambda: received(cluster) == 8)
    second = await replace_worker(cluster, "tiny#2")
    positions = list(range(9))
    assert [position for answer in (await whole,) for position in positions_of(path, answer)] == positions
    assert [position for chunk in await chunks for position in positions_of(path, chunk)] == positions
    assert [(len(generate.resume), generate.logprobs) for generate in second.generates] == [(4, 2)] * 2


def positions_of(path: str, answer: dict[str, Any]) -> list[int]:
    """The positions of the tokens whose log-probabilities an answer or a chunk has."""
    told = answer.get("logprobs") if path == NATIVE else answer["choices"][0]["logprobs"]
    tokens: list[str] = [] if not told else told["tokens"] if path == TEXT else texts_of(told)
    return [int(text) for text in tokens]


def texts_of(told: Any) -> list[str]:
    return [token["token"] for token in (told if isinstance(told, list) else told["content"])]


async def test_official_client_understands_them_and_the_penalties(cluster: Cluster, worker: FakeWorker) -> None:
    url = f"http://127.0.0.1:{cluster.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        chat = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=2,
            logprobs=True,
            top_logprobs=2,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"17": -100, "4": 5},
            extra_body={"repetition_penalty": 1.25},
        )
        assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
        assert [token.token for token in chat.choices[0].logprobs.content] == ["0 ", "1 "]
        assert chat.choices[0].logprobs.content[1].top_logprobs[1].bytes == [0xC3]
        text = await client.completions.create(model="tiny", prompt="Hi", max_tokens=2, logprobs=1)
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.text_offset == [0, 2]
    sampling = worker.generates[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.25, ((17, -100.0), (4, 5.0)))
