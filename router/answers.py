"""Pieces of answers that several surfaces share, and how they follow from a finished request.

A key that has no value yet is absent, not null.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from common.errors import MlxspecError
from common.messages import ChosenLogprob, Delta, Generate
from router.streams import Ended, Streams


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all answer bodies."""


class PromptDetails(Answer, frozen=True, kw_only=True):
    cached_tokens: int


class CompletionDetails(Answer, frozen=True, kw_only=True):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageAnswer(Answer, frozen=True, kw_only=True):
    """OpenAI's usage object."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class SpeculativeStats(Answer, frozen=True, kw_only=True):
    """What speculation did. `speedup`: time that plain steps would have taken over the time it took."""

    enabled: bool
    draft_tokens: int
    accepted_tokens: int
    steps: int
    acceptance_rate: float | UnsetType = UNSET
    speedup: float | UnsetType = UNSET
    tokens_per_step: float | UnsetType = UNSET


class ErrorDetail(Answer, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer, frozen=True, kw_only=True):
    """OpenAI's error body."""

    error: ErrorDetail


@dataclass(slots=True)
class Completion:
    """A finished request with its text (None when that was streamed), and log-probabilities if it asked for them."""

    generate: Generate
    ended: Ended
    text: str | None
    logprobs: Sequence[ChosenLogprob] | None = None


async def collect(streams: Streams, generates: Sequence[Generate]) -> list[Completion | MlxspecError]:
    """Read all streams to their ends; one outcome for each request, in order."""
    texts: list[list[str]] = [[] for _ in generates]
    logprobs: list[list[ChosenLogprob]] = [[] for _ in generates]
    outcomes: dict[int, Completion | MlxspecError] = {}
    async for index, event in streams:
        match event:
            case Delta():
                texts[index].append(event.text)
                logprobs[index] += event.logprobs
            case Ended():
                asked = None if generates[index].logprobs is None else logprobs[index]
                outcomes[index] = Completion(generates[index], event, "".join(texts[index]), asked)
            case MlxspecError():
                outcomes[index] = event
    return [outcomes[index] for index in range(len(generates))]


def require(outcomes: Sequence[Completion | MlxspecError]) -> list[Completion]:
    """All completions; raises the first error among them."""
    completions = []
    for outcome in outcomes:
        if isinstance(outcome, MlxspecError):
            raise outcome
        completions.append(outcome)
    return completions


def usage_of(ends: Sequence[Ended], choices: int = 1) -> UsageAnswer:
    """Token counts of a group; a prompt with several choices counts once."""
    prompt_tokens = sum(end.usage.prompt_tokens for end in ends[::choices])
    completion_tokens = sum(end.usage.completion_tokens for end in ends)
    accepted = sum(end.usage.accepted_tokens for end in ends)
    drafted = sum(end.usage.drafted_tokens for end in ends)
    return UsageAnswer(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(end.usage.cached_tokens for end in ends[::choices])),
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=max(0, drafted - accepted)
        ),
    )


def speculative_stats_of(ends: Sequence[Ended], *, is_enabled: bool) -> SpeculativeStats:
    """Drafting of a group of requests, summed up."""
    drafted = sum(end.usage.drafted_tokens for end in ends)
    accepted = sum(end.usage.accepted_tokens for end in ends)
    steps = sum(end.usage.steps for end in ends)
    tokens = sum(end.usage.completion_tokens for end in ends)
    return SpeculativeStats(
        enabled=is_enabled,
        draft_tokens=drafted,
        accepted_tokens=accepted,
        steps=steps,
        acceptance_rate=_ratio(accepted, drafted),
        speedup=_speedup(ends),
        tokens_per_step=_ratio(tokens, steps),
    )


def _speedup(ends: Sequence[Ended]) -> float | UnsetType:
    pairs = [
        (end.timings.plain_decode_s, end.timings.measured_decode_s)
        for end in ends
        if end.timings.plain_decode_s is not None and end.timings.measured_decode_s is not None
    ]
    return _ratio(sum(plain for plain, _ in pairs), sum(measured for _, measured in pairs))


def _ratio(part: float, whole: float) -> float | UnsetType:
    return round(part / whole, 4) if whole > 0 else UNSET


def error_answer(error: MlxspecError) -> ErrorAnswer:
    return ErrorAnswer(
        error=ErrorDetail(
            message=error.message, type=_error_type(error.http_status), param=error.param, code=error.code
        )
    )


def _error_type(status: int) -> str:
    known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return known.get(status, "server_error" if status >= 500 else "invalid_request_error")


def json_response(answer: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer), status=status, content_type="application/json", charset="utf-8"
    )
