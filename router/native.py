"""Our own routes: POST /generate and POST /batch_generate."""

from collections.abc import Iterable, Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from common.errors import InvalidRequest, MlxspecError
from common.messages import ChatMessage, ChatPrompt, Delta, Generate, Prompt, TextPrompt
from router import generation, sse
from router.answers import (
    Answer,
    Completion,
    ErrorAnswer,
    SpeculativeStats,
    UsageAnswer,
    collect,
    error_answer,
    json_response,
    require,
    speculative_stats_of,
    usage_of,
)
from router.app_keys import BACKEND, CONFIG
from router.body import read_body
from router.fetching import chosen_model
from router.logprobs import NativeLogprob, native_logprobs
from router.schemas import BatchGenerateBody, GenerateBody
from router.streams import Ended, Event


class Performance(Answer, frozen=True, kw_only=True):
    """Seconds, and tokens a second over the whole time."""

    throughput: float
    elapsed_time: float
    prompt_tokens: int
    completion_tokens: int
    queue_time: float
    prefill_time: float
    decode_time: float
    time_to_first_token: float | UnsetType = UNSET


class GenerateAnswer(Answer, frozen=True, kw_only=True):
    """Answer of /generate, and the last event of its stream (without text and `logprobs`, which came before)."""

    text: str | UnsetType = UNSET
    logprobs: list[NativeLogprob] | UnsetType = UNSET
    model: str
    finish_reason: str
    usage: UsageAnswer
    performance: Performance
    speculative_stats: SpeculativeStats


class TextPiece(Answer, frozen=True, kw_only=True):
    text: str
    logprobs: list[NativeLogprob] | UnsetType = UNSET


class BatchPerformance(Answer, frozen=True, kw_only=True):
    """Totals of a batch; `elapsed_time` is that of its slowest request."""

    throughput: float
    elapsed_time: float
    prompt_tokens: int
    completion_tokens: int


class BatchAnswer(Answer, frozen=True, kw_only=True):
    results: list[GenerateAnswer | ErrorAnswer]
    performance: BatchPerformance


async def generate(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, GenerateBody)
    prompt = _prompt("prompt", body.prompt, is_raw=bool(body.raw))
    backend = request.app[BACKEND]
    model = await chosen_model(request, body.model)
    generates = generation.build(
        request,
        body,
        [prompt],
        model=model,
        logprobs=body.logprobs,
    )
    with backend.start(model, generates) as streams:
        if body.stream:
            return await sse.respond(request, streams, _Teller(model, generates))
        (completion,) = require(await collect(streams, generates))
    return json_response(_answer(model, completion))


async def batch_generate(request: web.Request) -> web.Response:
    body = await read_body(request, BatchGenerateBody)
    config, backend = request.app[CONFIG], request.app[BACKEND]
    if body.stream:
        raise InvalidRequest("stream is true; /batch_generate answers as a whole", param="stream")
    generation.check_count("prompts", len(body.prompts), config.server.max_batch_prompts)
    generation.check_group(len(body.prompts), config)
    prompts = [_prompt(f"prompts[{number}]", text, is_raw=bool(body.raw)) for number, text in enumerate(body.prompts)]
    model = await chosen_model(request, body.model)
    generates = generation.build(request, body, prompts, model=model, logprobs=body.logprobs)
    with backend.start(model, generates) as streams:
        outcomes = await collect(streams, generates)
    return json_response(_batch_answer(model, outcomes))


def _prompt(name: str, text: str, *, is_raw: bool) -> Prompt:
    if not text:
        raise InvalidRequest(f"{name} is empty; it needs at least one character", param=name)
    if is_raw:
        return TextPrompt(text=text)
    return ChatPrompt(messages=(ChatMessage(role="user", content=text),), plain_fallback=True)


class _Teller:
    """The stream of /generate: pieces of text, then everything else."""

    def __init__(self, model: str, generates: Sequence[Generate]) -> None:
        self._model = model
        self._generates = generates

    def tell(self, index: int, event: Event) -> Iterable[msgspec.Struct]:
        if isinstance(event, Delta) and (event.text or event.logprobs):
            yield TextPiece(text=event.text, logprobs=native_logprobs(event.logprobs) if event.logprobs else UNSET)
        elif isinstance(event, Ended):
            yield _answer(self._model, Completion(self._generates[index], event, None))

    def close(self) -> Iterable[msgspec.Struct]:
        return ()


def _answer(model: str, completion: Completion) -> GenerateAnswer:
    ended = completion.ended
    return GenerateAnswer(
        text=UNSET if completion.text is None else completion.text,
        logprobs=UNSET if completion.logprobs is None else native_logprobs(completion.logprobs),
        model=model,
        finish_reason=ended.reason,
        usage=usage_of([ended]),
        performance=_performance(ended),
        speculative_stats=speculative_stats_of([ended], is_enabled=completion.generate.speculation.is_on),
    )


def _performance(ended: Ended) -> Performance:
    return Performance(
        throughput=_per_second(ended.usage.completion_tokens, ended.elapsed_s),
        elapsed_time=round(ended.elapsed_s, 6),
        time_to_first_token=UNSET if ended.first_token_s is None else round(ended.first_token_s, 6),
        prompt_tokens=ended.usage.prompt_tokens,
        completion_tokens=ended.usage.completion_tokens,
        queue_time=round(ended.timings.queue_s, 6),
        prefill_time=round(ended.timings.prefill_s, 6),
        decode_time=round(ended.timings.decode_s, 6),
    )


def _batch_answer(model: str, outcomes: Sequence[Completion | MlxspecError]) -> BatchAnswer:
    ends = [outcome.ended for outcome in outcomes if isinstance(outcome, Completion)]
    elapsed_s = max((end.elapsed_s for end in ends), default=0.0)
    tokens = sum(end.usage.completion_tokens for end in ends)
    return BatchAnswer(
        results=[
            _answer(model, outcome) if isinstance(outcome, Completion) else error_answer(outcome)
            for outcome in outcomes
        ],
        performance=BatchPerformance(
            throughput=_per_second(tokens, elapsed_s),
            elapsed_time=round(elapsed_s, 6),
            prompt_tokens=sum(end.usage.prompt_tokens for end in ends),
            completion_tokens=tokens,
        ),
    )


def _per_second(tokens: int, elapsed_s: float) -> float:
    return round(tokens / elapsed_s, 3) if elapsed_s > 0 else 0.0
