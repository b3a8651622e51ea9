"""The two generating OpenAI surfaces, by their bytes and by the official client."""

import json
from typing import Any

import openai
import pytest

from common.messages import ChatPrompt, Generate, TextPrompt, TokenPrompt
from tests.fakes import PROMPT_TOKENS, Cluster, FakeWorker, failed, wait_until, whole_text
from tests.router.client import post, stream

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def messages_of(generate: Generate) -> list[tuple[str, str]]:
    assert isinstance(generate.prompt, ChatPrompt)
    assert not generate.prompt.plain_fallback
    return [(message.role, message.content) for message in generate.prompt.messages]


async def test_chat_answer_has_openais_shape(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, CHAT, model="tiny", messages=HELLO, max_tokens=5)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": whole_text(5)},
            "finish_reason": "length",
            "logprobs": None,
        }
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, 5)
    assert usage["total_tokens"] == PROMPT_TOKENS + 5
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 3,
        "rejected_prediction_tokens": 1,
    }
    assert answer["speculative_stats"]["draft_tokens"] == 4


async def test_chat_messages_take_parts_and_the_developer_role(cluster: Cluster, worker: FakeWorker) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "c", "tool_calls": []},
        {"role": "user", "content": "d"},
    ]
    await post(cluster, CHAT, messages=turns, max_tokens=1)
    assert messages_of(worker.generates[0]) == [
        ("system", "Be brief."),
        ("user", "ab"),
        ("assistant", "c"),
        ("user", "d"),
    ]


async def test_harmless_and_unknown_fields_are_taken(cluster: Cluster, worker: FakeWorker) -> None:
    await post(
        cluster,
        CHAT,
        messages=HELLO,
        max_tokens=1,
        user="me",
        logprobs=False,
        tools=[],
        tool_choice="auto",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        service_tier="auto",
        temperature=None,
    )


async def test_chat_stream_is_role_then_text_then_reason_then_usage(cluster: Cluster, worker: FakeWorker) -> None:
    chunks = await stream(
        cluster, CHAT, messages=HELLO, max_completion_tokens=3, stream_options={"include_usage": True}
    )
    *body, last = chunks
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert body[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in body) == whole_text(3)
    assert [chunk["choices"][0]["finish_reason"] for chunk in body] == [None] * 4 + ["length"]
    assert all(chunk["usage"] is None for chunk in body)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["speculative_stats"]["enabled"] is True


async def test_stream_has_no_usage_unless_asked_for(cluster: Cluster, worker: FakeWorker) -> None:
    chunks = await stream(cluster, CHAT, messages=HELLO, max_tokens=2)
    assert not any("usage" in chunk for chunk in chunks)


async def test_choices_use_consecutive_seeds_and_count_the_prompt_once(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, CHAT, messages=HELLO, n=3, seed=2**63 - 2, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [g.sampling.seed for g in worker.generates] == [2**63 - 2, 2**63 - 1, 0]
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_streamed_choices_are_told_apart_by_index(cluster: Cluster, worker: FakeWorker, path: str) -> None:
    body: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    chunks = await stream(cluster, path, n=2, max_tokens=3, **body)
    texts = {0: "", 1: ""}
    reasons = {}
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: whole_text(3), 1: whole_text(3)}
    assert reasons == {0: "length", 1: "length"}


async def test_completion_continues_text_as_it_is(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, TEXT, model="tiny", prompt="Once", max_tokens=2, stop="x", seed=1)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == whole_text(2)
    (generate,) = worker.generates
    assert generate.prompt == TextPrompt(text="Once")
    assert generate.stop == ("x",)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TextPrompt(text="a")]),
        (["a", "b"], [TextPrompt(text="a"), TextPrompt(text="b")]),
        ([1, 2], [TokenPrompt(token_ids=(1, 2))]),
        ([[1], [2, 3]], [TokenPrompt(token_ids=(1,)), TokenPrompt(token_ids=(2, 3))]),
    ],
)
async def test_completion_takes_every_form_of_prompt(
    cluster: Cluster, worker: FakeWorker, prompt: Any, expected: list[Any]
) -> None:
    answer = await post(cluster, TEXT, prompt=prompt, max_tokens=1)
    assert [generate.prompt for generate in worker.generates] == expected
    assert len(answer["choices"]) == len(expected)
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS * len(expected)


async def test_choices_of_several_prompts_stand_together(cluster: Cluster, worker: FakeWorker) -> None:
    answer = await post(cluster, TEXT, prompt=["a", "b"], n=2, seed=5, max_tokens=1)
    assert len(answer["choices"]) == 4
    assert answer["usage"]["prompt_tokens"] == 2 * PROMPT_TOKENS
    asked = [(g.prompt.text, g.sampling.seed) for g in worker.generates if isinstance(g.prompt, TextPrompt)]
    assert asked == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]


async def test_default_means_the_default_model(cluster: Cluster, worker: FakeWorker) -> None:
    assert (await post(cluster, CHAT, model="default", messages=HELLO, max_tokens=1))["model"] == "tiny"


async def test_error_before_the_stream_is_an_ordinary_answer(cluster: Cluster, worker: FakeWorker) -> None:
    worker.answer = failed("context_length_exceeded", "prompt has 9 tokens; the context holds 8")
    async with cluster.http.post(CHAT, json={"messages": HELLO, "stream": True}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "context_length_exceeded"


async def test_error_within_the_stream_is_its_last_event(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    async with cluster.http.post(CHAT, json={"messages": HELLO, "stream": True}) as response:
        assert response.status == 200
        await wait_until(lambda: worker.generates)
        message = failed("internal_error", "bad row")(worker.generates[0])
        assert message is not None
        await worker.send(message)
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert json.loads(lines[-1])["error"]["message"] == "bad row"
    assert "[DONE]" not in lines


async def test_official_client_understands_everything(cluster: Cluster, worker: FakeWorker) -> None:
    url = f"http://127.0.0.1:{cluster.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
        assert answer.choices[0].message.content == whole_text(3)
        text = ""
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        assert text == whole_text(3)
        assert (await client.completions.create(model="tiny", prompt="Hi", max_tokens=2)).choices[0].text == whole_text(
            2
        )
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "mlxspec"
        with pytest.raises(openai.NotFoundError, match="known models: tiny"):
            await client.chat.completions.create(model="no", messages=[{"role": "user", "content": "Hi"}])


async def test_drafted_characters_are_told_on_request_only(cluster: Cluster, worker: FakeWorker) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    chunks = await stream(cluster, "/v1/chat/completions", **body)
    assert not any("drafted_chars" in choice for chunk in chunks for choice in chunk["choices"])
    chunks = await stream(cluster, "/v1/chat/completions", **body, show_drafts=True)
    pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["delta"].get("content")]
    assert [piece["drafted_chars"] for piece in pieces] == [0, 0]
