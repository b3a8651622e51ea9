"""The official `openai` client works unchanged, and the token counts are those of the model's own tokenizer."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from transformers import AutoTokenizer

from tests.e2e.server import Serve

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[Any] = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Tell me a story about a lighthouse."},
]
PLENTY = 40  # tokens: more than the answer about France has


@pytest.fixture(scope="module")
def client(server: Serve) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


def prompt_tokens(tokenizer: Any, messages: list[Any]) -> int:
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def test_chat_ends_by_itself_and_counts_its_end_token(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    answer = client.chat.completions.create(
        model=server.model, messages=CAPITAL, temperature=0, max_completion_tokens=PLENTY
    )
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", server.model)
    assert (choice.message.role, choice.message.content) == ("assistant", "The capital of France is Paris.")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt_tokens(tokenizer, CAPITAL)
    assert answer.usage.completion_tokens == len(tokenizer.encode(choice.message.content)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_second_turn_of_a_chat_reads_only_what_is_new(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    question: list[Any] = [{"role": "user", "content": "Name three rivers in Europe and say where each one ends."}]
    ask: dict[str, Any] = {"model": server.model, "temperature": 0, "max_tokens": 40}
    first = client.chat.completions.create(messages=question, **ask)
    more = {"role": "user", "content": "And in Asia?"}
    turns = [*question, {"role": "assistant", "content": first.choices[0].message.content}, more]
    second = client.chat.completions.create(messages=turns, **ask)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens == prompt_tokens(tokenizer, turns)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert prompt_tokens(tokenizer, question) <= cached < second.usage.prompt_tokens
    figures = server.request("GET", "/stats")[1]["models"][server.model]
    assert figures["cached_tokens"] >= cached


def test_chat_cut_by_max_tokens_has_as_many_tokens(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model=server.model, messages=STORY, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt_tokens(tokenizer, STORY)
    assert answer.usage.completion_tokens == 12 == len(tokenizer.encode(choice.message.content))


def test_streamed_chat_gives_the_same_text_then_the_usage(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    with client.chat.completions.create(
        model=server.model,
        messages=CAPITAL,
        temperature=0,
        max_tokens=PLENTY,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        *chunks, last = list(stream)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "The capital of France is Paris."
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == prompt_tokens(tokenizer, CAPITAL)
    assert last.usage.completion_tokens == len(tokenizer.encode(text)) + 1


def test_stream_without_include_usage_has_no_usage(client: OpenAI, server: Serve) -> None:
    with client.chat.completions.create(
        model=server.model, messages=CAPITAL, temperature=0, max_tokens=4, stream=True
    ) as stream:
        chunks = list(stream)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completion_continues_a_text_or_its_tokens_as_they_are(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    prompt = "The capital of France is"
    ids: list[int] = tokenizer.encode(prompt)
    for given in (prompt, ids):
        answer = client.completions.create(model=server.model, prompt=given, temperature=0, max_tokens=8)
        (choice,) = answer.choices
        assert "Paris" in choice.text
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == 8 == len(tokenizer.encode(choice.text))


def test_streamed_completion_gives_the_same_text(client: OpenAI, server: Serve) -> None:
    asked: dict[str, Any] = {"model": server.model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked)
    with client.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    for usage in (whole.usage, chunks[-1].usage):  # how much of it was drafted may differ
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)


def test_two_choices_come_from_the_seed_and_the_one_after_it(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"model": server.model, "messages": STORY, "temperature": 1.0, "max_tokens": 12}
    pair = client.chat.completions.create(**asked, n=2, seed=7)
    assert [choice.index for choice in pair.choices] == [0, 1]
    texts = [choice.message.content for choice in pair.choices]
    assert texts[0] != texts[1]
    assert pair.usage is not None
    assert pair.usage.prompt_tokens == prompt_tokens(tokenizer, STORY)
    assert pair.usage.completion_tokens == 24
    for seed, text in zip((7, 8), texts, strict=True):
        assert client.chat.completions.create(**asked, seed=seed).choices[0].message.content == text


@pytest.mark.parametrize("stop", [" Paris", ["nowhere", "Paris"]])
def test_stop_string_ends_the_answer_and_is_left_out(client: OpenAI, server: Serve, stop: str | list[str]) -> None:
    answer = client.chat.completions.create(
        model=server.model, messages=CAPITAL, temperature=0, max_tokens=PLENTY, stop=stop
    )
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.choices[0].message.content or "").rstrip() == "The capital of France is"


def test_logprobs_of_a_chat_are_told_for_each_token(client: OpenAI, server: Serve) -> None:
    """Greedy: the chosen token is the likeliest. Streamed or not, drafted or not, they are the same."""
    asked: dict[str, Any] = {"model": server.model, "messages": CAPITAL, "temperature": 0, "max_tokens": PLENTY}
    asked |= {"logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == answer.usage.completion_tokens
    assert b"".join(bytes(token.bytes or []) for token in tokens[:-1]).decode() == answer.choices[0].message.content
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert (token.top_logprobs[0].token, values[0]) == (token.token, pytest.approx(token.logprob))
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0 + 1e-4
    with client.chat.completions.create(**asked, stream=True, extra_body={"speculative": False}) as stream:
        choices = [choice for chunk in stream for choice in chunk.choices]
    streamed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content or []]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens], abs=1e-3)


def test_logprobs_of_a_completion_are_four_lists(client: OpenAI, server: Serve) -> None:
    answer = client.completions.create(
        model=server.model, prompt="The capital of France is", temperature=0, max_tokens=8, logprobs=2
    )
    (choice,) = answer.choices
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert "".join(told.tokens) == choice.text
    assert [choice.text[at:].startswith(t) for t, at in zip(told.tokens, told.text_offset, strict=True)] == [True] * 8
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == logprob == max(top.values()) <= 0


def test_a_bias_forbids_a_token_and_another_forces_one(client: OpenAI, server: Serve, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"model": server.model, "messages": CAPITAL, "temperature": 0, "max_tokens": PLENTY}
    (paris,) = tokenizer.encode(" Paris")
    forbidden = client.chat.completions.create(**asked, logit_bias={str(paris): -100})
    assert " Paris" not in (forbidden.choices[0].message.content or "")
    forced = client.chat.completions.create(**(asked | {"max_tokens": 5}), logit_bias={str(paris): 100})
    assert forced.choices[0].message.content == " Paris" * 5
    with pytest.raises(openai.UnprocessableEntityError, match=f"token {10**9}; this model's ids lie in"):
        client.chat.completions.create(**asked, logit_bias={str(10**9): 1})


def test_penalties_change_the_answer(client: OpenAI, server: Serve) -> None:
    asked: dict[str, Any] = {"model": server.model, "messages": STORY, "temperature": 0, "max_tokens": 30}
    usual = client.chat.completions.create(**asked).choices[0].message.content
    both = client.chat.completions.create(**asked, frequency_penalty=2.0, presence_penalty=2.0)
    assert both.choices[0].message.content != usual
    harsh = client.chat.completions.create(**asked, extra_body={"repetition_penalty": 10.0})
    words = (harsh.choices[0].message.content or "").lower().split()
    assert len(set(words)) > 0.9 * len(words)


def test_models_are_listed_and_shown(client: OpenAI, server: Serve) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model


def test_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=CAPITAL)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_impossible_temperature_is_named_with_its_value(client: OpenAI, server: Serve) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model=server.model, messages=CAPITAL, temperature=-1)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
    assert "-1" in caught.value.message


def test_body_without_messages_is_a_bad_request_that_says_so(client: OpenAI, server: Serve) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.post("/chat/completions", body={"model": server.model}, cast_to=object)


async def test_requests_of_an_async_client_are_answered_together(server: Serve) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def ask() -> str | None:
            answer = await client.chat.completions.create(
                model=server.model, messages=CAPITAL, temperature=0, max_tokens=PLENTY
            )
            return answer.choices[0].message.content

        assert set(await asyncio.gather(*(ask() for _ in range(4)))) == {"The capital of France is Paris."}
