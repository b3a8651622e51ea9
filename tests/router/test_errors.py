"""Wrong input: the status, the code, and a message that names the field, the value and the limit."""

import asyncio
import random
from typing import Any

import pytest

from common.config import Config, ServerConfig
from router.schemas import BatchGenerateBody, ChatBody, CompletionBody, GenerateBody
from tests.fakes import Cluster, FakeWorker, running_cluster, wait_until

HELLO = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO, **more}


def text(**more: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "Hi", **more}


def native(**more: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"prompt": "Hi", **more}


def batch(**more: Any) -> tuple[str, dict[str, Any]]:
    return "/batch_generate", {"prompts": ["Hi"], **more}


TABLE = [
    # request, status, field, words of the message
    ((CHAT, {}), 400, "messages", "missing"),
    ((CHAT, {"messages": []}), 400, "messages", "empty"),
    ((CHAT, {"messages": HELLO * 4097}), 422, "messages", "4097 items; at most 4096"),
    ((CHAT, {"messages": [{"role": "user"}]}), 400, "messages[0].content", "missing"),
    ((CHAT, {"messages": [{"role": "king", "content": "x"}]}), 422, "messages[0].role", "'king'"),
    ((CHAT, {"messages": [{"role": "tool", "content": "x"}]}), 400, "messages[0].role", "not supported yet"),
    (
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        400,
        "messages[0].content[0]",
        "'image_url' are not supported yet",
    ),
    (
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}),
        400,
        "messages[0].tool_calls",
        "not supported yet",
    ),
    (chat(n=0), 422, "n", "n is 0; it must lie in [1, 8]"),
    (chat(n=9), 422, "n", "[1, 8]"),
    (chat(max_tokens=0), 422, "max_tokens", "max_tokens is 0"),
    (chat(max_completion_tokens=-1), 422, "max_tokens", "-1"),
    (chat(max_tokens=1, max_completion_tokens=2), 400, "max_completion_tokens", "mean the same"),
    (chat(temperature=2.5), 422, "temperature", "2.5; it must lie in [0.0, 2.0]"),
    (chat(temperature="hot"), 400, "temperature", "expected float"),
    (chat(top_p=0), 422, "top_p", "(0.0, 1.0]"),
    (chat(top_k=-1), 422, "top_k", "-1"),
    (chat(min_p=1.5), 422, "min_p", "1.5"),
    (chat(seed=2**63), 422, "seed", str(2**63)),
    (chat(seed=-1), 422, "seed", "-1"),
    (chat(seed=1.5), 400, "seed", "expected int"),
    (chat(stop=["x"] * 17), 422, "stop", "17 strings; at most 16"),
    (chat(stop=""), 422, "stop", "0 characters"),
    (chat(model="no"), 404, "model", "known models: tiny"),
    (chat(logprobs=5), 400, "logprobs", "expected bool"),
    (chat(top_logprobs=3), 400, "top_logprobs", "top_logprobs is 3 without logprobs; set logprobs to true"),
    (chat(logprobs=False, top_logprobs=3), 400, "top_logprobs", "without logprobs"),
    (chat(logprobs=True, top_logprobs=21), 422, "top_logprobs", "top_logprobs is 21; it must lie in [0, 20]"),
    (chat(logprobs=True, top_logprobs=-1), 422, "top_logprobs", "-1"),
    (chat(tools=[{"type": "function"}]), 400, "tools", "not supported yet"),
    (chat(functions=[{}]), 400, "functions", "not supported yet"),
    (chat(response_format={"type": "json_object"}), 400, "response_format", "not supported yet"),
    (chat(presence_penalty=2.5), 422, "presence_penalty", "2.5; it must lie in [-2.0, 2.0]"),
    (chat(frequency_penalty=-3), 422, "frequency_penalty", "-3.0; it must lie in [-2.0, 2.0]"),
    (chat(repetition_penalty=0), 422, "repetition_penalty", "0.0; it must lie in [0.01, 10.0]"),
    (chat(repetition_penalty="x"), 400, "repetition_penalty", "expected float"),
    (chat(logit_bias={"1": 101}), 422, "logit_bias", "token 1 is 101.0; it must lie in [-100.0, 100.0]"),
    (chat(logit_bias={"Paris": 1}), 422, "logit_bias", "key 'Paris'; its keys are token ids"),
    (chat(logit_bias={"-1": 1}), 422, "logit_bias", "key '-1'"),
    (chat(logit_bias={"01": 1}), 422, "logit_bias", "key '01'"),
    (chat(logit_bias={"9" * 5000: 1}), 422, "logit_bias", "99…'"),
    (chat(logit_bias={"1": "much"}), 400, "logit_bias[...]", "expected float"),
    (chat(logit_bias={str(i): 1 for i in range(301)}), 422, "logit_bias", "301 tokens; at most 300"),
    (chat(logit_bias=[1]), 400, "logit_bias", "expected object"),
    (chat(speculative={"drafter": "magic"}), 422, "speculative.drafter", "'magic'"),
    (chat(speculative={"max_draft_tokens": 33}), 422, "speculative.max_draft_tokens", "33"),
    (chat(speculative={"depth": 3}), 400, "speculative.depth", "not a known field"),
    (chat(speculative=3), 400, "speculative", "expected bool"),
    (text(echo=True), 400, "echo", "not supported yet"),
    (text(suffix="x"), 400, "suffix", "not supported yet"),
    (text(best_of=2), 400, "best_of", "not supported yet"),
    (text(logprobs=True), 400, "logprobs", "expected int"),
    (text(logprobs=21), 422, "logprobs", "logprobs is 21; it must lie in [0, 20]"),
    (text(prompt=""), 400, "prompt", "empty"),
    (text(prompt=[]), 400, "prompt", "empty"),
    (text(prompt=["a", ""]), 400, "prompt[1]", "empty"),
    (text(prompt=[[]]), 400, "prompt[0]", "empty"),
    (text(prompt=["a", 1]), 400, "prompt", "mixes"),
    (text(prompt=[-1]), 422, "prompt", "token id -1"),
    (text(prompt=["a"] * 257), 422, "prompt", "257 items; at most 256"),
    (text(prompt=["a"] * 200, n=2), 422, None, "400 completions; at most 256"),
    (native(prompt=""), 400, "prompt", "empty"),
    (native(prompt=3), 400, "prompt", "expected str"),
    (("/generate", {}), 400, "prompt", "missing"),
    (native(max_token=3), 400, "max_token", "not a known field"),
    (native(model="no"), 404, "model", "'no'"),
    (native(logprobs=-1), 422, "logprobs", "logprobs is -1"),
    (native(presence_penalty=3), 422, "presence_penalty", "3.0"),
    (native(top_logprobs=3), 400, "top_logprobs", "not a known field"),
    (batch(logprobs=21), 422, "logprobs", "21"),
    (batch(prompts=[]), 400, "prompts", "empty"),
    (batch(prompts=["a", ""]), 400, "prompts[1]", "empty"),
    (batch(prompts=["a"] * 257), 422, "prompts", "257 items; at most 256"),
    (batch(stream=True), 400, "stream", "as a whole"),
    (("/models/load", {}), 400, "model", "missing"),
    (("/models/load", {"model": "no"}), 404, "model", "known models: tiny"),
    (("/models/load", {"path": "/x", "name": "a b"}), 422, "name", "'a b'"),
    (("/models/load", {"path": "/x", "name": "a/../b"}), 422, "name", "'..'"),
    (("/models/load", {"path": "x" * 1025, "name": "y"}), 422, "path", "1025 characters"),
    (("/models/load", {"model": "tiny", "force": True}), 400, "force", "not a known field"),
]


@pytest.mark.parametrize(("request_", "status", "field", "words"), TABLE)
async def test_wrong_input_is_named(
    cluster: Cluster,
    worker: FakeWorker,
    request_: tuple[str, dict[str, Any]],
    status: int,
    field: str | None,
    words: str,
) -> None:
    path, body = request_
    async with cluster.http.post(path, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (status, field), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert worker.generates == []


RAW = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b'{"prompt": "Hi"} x', "not valid JSON"),
    (b'{"prompt": "Hi", "temperature": NaN}', "not valid JSON"),
    (b'{"prompt": "Hi", "temperature": Infinity}', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b'{"prompt": "\\ud800"}', "not valid JSON"),
    (b"[]", "expected object"),
    (b"null", "expected object"),
]


@pytest.mark.parametrize(("body", "words"), RAW)
async def test_what_is_no_json_object_is_400(cluster: Cluster, worker: FakeWorker, body: bytes, words: str) -> None:
    headers = {"Content-Type": "application/json"}
    async with cluster.http.post("/generate", data=body, headers=headers) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert words in error["message"]


@pytest.mark.parametrize("depth", [65, 100_000])
async def test_deep_nesting_is_400(cluster: Cluster, worker: FakeWorker, depth: int) -> None:
    deep = '{"messages": [{"role": "user", "content": "Hi"}], "x": ' + "[" * depth + "]" * depth + "}"
    headers = {"Content-Type": "application/json"}
    async with cluster.http.post(CHAT, data=deep, headers=headers) as response:
        assert response.status == 400
        assert "deeper than 64" in (await response.json())["error"]["message"]


async def test_other_content_type_is_415(cluster: Cluster, worker: FakeWorker) -> None:
    async with cluster.http.post("/generate", data=b"{}", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 415
        assert "'text/plain'" in (await response.json())["error"]["message"]


async def test_unknown_route_is_404_and_wrong_method_405_in_json(cluster: Cluster) -> None:
    async with cluster.http.get("/nothing") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
    async with cluster.http.get("/generate") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (405, "method_not_allowed")
        assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_body_over_the_limit_is_413(is_chunked: bool) -> None:
    async def pieces() -> Any:
        for _ in range(40):
            yield b"x" * 1000

    async with running_cluster(Config(server=ServerConfig(max_body_bytes=20_000))) as cluster:
        data: Any = pieces() if is_chunked else b"x" * 40_000
        headers = {"Content-Type": "application/json"}
        async with cluster.http.post("/generate", data=data, headers=headers) as response:
            error = (await response.json())["error"]
        assert response.status == 413
        assert "at most 20000" in error["message"]


async def test_body_that_does_not_arrive_is_408() -> None:
    async with running_cluster(Config(server=ServerConfig(body_timeout_s=0.1))) as cluster:
        answer = await raw_request(
            cluster,
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10\r\n\r\n{",
        )
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"0.1 s" in answer


async def test_head_that_does_not_arrive_closes_the_connection() -> None:
    async with running_cluster(Config(server=ServerConfig(header_timeout_s=0.1))) as cluster:
        assert await raw_request(cluster, b"POST /generate HTTP/1.1\r\nHost: loc") == b""


async def test_foreign_host_and_origin_are_403(cluster: Cluster, worker: FakeWorker) -> None:
    own = f"127.0.0.1:{cluster.port}"
    for headers, status in [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": f"localhost:{cluster.port}"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": f"http://{own}"}, 200),
    ]:
        async with cluster.http.get("/models", headers=headers) as response:
            assert response.status == status, headers
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_request_id_is_echoed_if_it_is_sane(cluster: Cluster, worker: FakeWorker) -> None:
    body = {"prompt": "Hi", "max_tokens": 1}
    async with cluster.http.post("/generate", json=body, headers={"X-Request-Id": "my-id.1"}) as response:
        assert response.headers["X-Request-Id"] == "my-id.1"
    assert worker.generates[0].request_id == "my-id.1.0"
    async with cluster.http.get("/nothing", headers={"X-Request-Id": "a b" * 50}) as response:
        assert response.headers["X-Request-Id"].isalnum()


async def test_same_request_id_twice_at_a_time_stays_two_requests(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True

    async def ask() -> str:
        body = {"prompt": "Hi", "max_tokens": 2}
        async with cluster.http.post("/generate", json=body, headers={"X-Request-Id": "same"}) as response:
            text: str = (await response.json())["text"]
            return text

    answers = [asyncio.create_task(ask()) for _ in range(2)]
    await wait_until(lambda: len(worker.generates) == 2)
    for generate in worker.generates:
        await worker.finish(generate)
    assert await asyncio.gather(*answers) == ["0 1 "] * 2


async def test_request_that_cannot_be_read_is_not_quoted_in_the_log(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = await raw_request(cluster, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx-api-key: s3cret\x00\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]
    (record,) = (record for record in caplog.records if record.name == "aiohttp.server")
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert "cannot be read" in caplog.text
    assert "s3cret" not in caplog.text


async def raw_request(cluster: Cluster, data: bytes) -> bytes:
    """All that the server says to these bytes, until it closes or falls silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
    writer.write(data)
    try:
        async with asyncio.timeout(3):
            return await reader.read(4096)
    finally:
        writer.close()
        await writer.wait_closed()


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    2**64,
    1e300,
    "",
    "x",
    "\0",
    [],
    [1],
    ["x"],
    [[1]],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("seed", range(4))
async def test_no_body_is_an_internal_error(cluster: Cluster, worker: FakeWorker, seed: int) -> None:
    """Fields of every route with values of every kind: an answer or a named error, never a 5xx."""
    chance = random.Random(seed)
    for _ in range(60):
        path, kind = chance.choice(BODIES)
        names = chance.sample(kind.__struct_fields__, chance.randint(0, 4))
        body = {name: chance.choice(VALUES) for name in names} | chance.choice([{}, GOOD[path]])
        async with cluster.http.post(path, json=body) as response:
            await response.read()
            assert response.status < 500, (path, body)


BODIES = [
    (CHAT, ChatBody),
    (TEXT, CompletionBody),
    ("/generate", GenerateBody),
    ("/batch_generate", BatchGenerateBody),
]
GOOD: dict[str, dict[str, Any]] = {path: body | {"max_tokens": 1} for path, body in (chat(), text(), native(), batch())}
