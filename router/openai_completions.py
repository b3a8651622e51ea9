"""POST /v1/completions: the prompt is always continued as it is."""

from collections.abc import Sequence

from aiohttp import web

from common.errors import InvalidRequest, InvalidValue
from common.messages import Delta, Prompt, TextPrompt, TokenPrompt
from router import generation, openai
from router.answers import Answer, Completion
from router.app_keys import CONFIG
from router.body import read_body
from router.fetching import chosen_model
from router.logprobs import TextLogprobs, text_logprobs
from router.schemas import CompletionBody

MAX_PROMPT_TOKENS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1


class TextChoice(Answer, frozen=True, kw_only=True):
    """A choice, whole or a piece of a stream."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None


class TextDialect:
    """The words of text completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choice(self, index: int, completion: Completion) -> Answer:
        found = None if completion.logprobs is None else text_logprobs(completion.logprobs)
        reason = completion.ended.reason
        return TextChoice(index=index, text=completion.text or "", finish_reason=reason, logprobs=found)

    def first_piece(self, index: int) -> Answer | None:
        return None

    def piece(self, index: int, delta: Delta) -> Answer:
        found = text_logprobs(delta.logprobs) if delta.logprobs else None
        return TextChoice(index=index, text=delta.text, logprobs=found)

    def last_piece(self, index: int, reason: str) -> Answer:
        return TextChoice(index=index, text="", finish_reason=reason)


async def create(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, CompletionBody)
    config = request.app[CONFIG]
    generation.check_supported(body)
    prompts = _prompts(body.prompt, config.server.max_batch_prompts)
    choices = generation.check_choices(body.n, config)
    generation.check_group(len(prompts) * choices, config)
    model = await chosen_model(request, body.model)
    generates = generation.build(
        request,
        body,
        prompts,
        model=model,
        choices=choices,
        logprobs=body.logprobs,
    )
    return await openai.answer(
        request,
        TextDialect(),
        model,
        generates,
        choices=choices,
        is_stream=bool(body.stream),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _prompts(prompt: str | list[str | int | list[int]], limit: int) -> list[Prompt]:
    if isinstance(prompt, str):
        return [_text("prompt", prompt)]
    token_ids = [item for item in prompt if isinstance(item, int)]
    if prompt and len(token_ids) == len(prompt):
        return [_tokens("prompt", token_ids)]
    if token_ids:
        raise InvalidRequest("prompt mixes token ids with other items", param="prompt")
    generation.check_count("prompt", len(prompt), limit)
    return [_item(f"prompt[{number}]", item) for number, item in enumerate(prompt)]


def _item(name: str, item: str | int | list[int]) -> Prompt:
    if isinstance(item, str):
        return _text(name, item)
    return _tokens(name, [item] if isinstance(item, int) else item)


def _text(name: str, text: str) -> TextPrompt:
    if not text:
        raise InvalidRequest(f"{name} is empty; it needs at least one character", param=name)
    return TextPrompt(text=text)


def _tokens(name: str, token_ids: Sequence[int]) -> TokenPrompt:
    generation.check_count(name, len(token_ids), MAX_PROMPT_TOKENS)
    for wrong in (token_id for token_id in token_ids if not 0 <= token_id <= MAX_TOKEN_ID):
        raise InvalidValue(f"{name} has the token id {wrong}; ids lie in [0, {MAX_TOKEN_ID}]", param=name)
    return TokenPrompt(token_ids=tuple(token_ids))
