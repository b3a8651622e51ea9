"""From what a body asks for to `Generate` messages: defaults, ranges, seeds."""

import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from common.config import Config, default_sampling, default_speculation
from common.errors import InvalidRequest, InvalidValue
from common.messages import Generate, Prompt
from common.priority import SERVICE_TIERS, Priority, to_priority
from common.sampling import (
    MAX_SEED,
    Sampling,
    Speculation,
    check_logprobs,
    check_sampling,
    check_speculation,
    check_stop,
)
from router.app_keys import CONFIG, REQUEST_ID
from router.schemas import HARMLESS, GenerationFields, OpenAIFields, SpeculativeOptions

MAX_MAX_TOKENS = 2**31 - 1
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def build(
    request: web.Request,
    fields: GenerationFields,
    prompts: Sequence[Prompt],
    *,
    model: str,
    choices: int = 1,
    max_tokens: int | None = None,
    logprobs: int | None = None,
) -> tuple[Generate, ...]:
    """One message for each choice of each prompt, choices of a prompt together. Raises `InvalidValue`.

    Without a seed each prompt gets a random one; choice i of a prompt uses its seed + i.
    """
    config, request_id = request.app[CONFIG], request[REQUEST_ID]
    sampling = _sampling(fields, config)
    speculation = _speculation(fields.speculative, model, config)
    stop = _stop(fields.stop)
    priority = _priority(fields)
    limit = _max_tokens(fields.max_tokens if max_tokens is None else max_tokens, config)
    if logprobs is not None:
        check_logprobs("logprobs", logprobs)
    messages = []
    for number, prompt in enumerate(prompts):
        seed = sampling.seed if fields.seed is not None else secrets.randbits(63)
        for choice in range(choices):
            messages.append(
                Generate(
                    request_id=f"{request_id}.{number * choices + choice}",
                    prompt=prompt,
                    sampling=msgspec.structs.replace(sampling, seed=(seed + choice) % (MAX_SEED + 1)),
                    max_tokens=limit,
                    stop=stop,
                    speculation=speculation,
                    ignore_eos=bool(fields.ignore_eos),
                    logprobs=logprobs,
                    scope=_scope(request),
                    priority=priority,
                )
            )
    return tuple(messages)


def _scope(request: web.Request) -> str:
    """A name for the client's API key that does not tell it; "" for those without one."""
    key = request.headers.get("Authorization") or request.headers.get("x-api-key") or ""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""


def check_count(name: str, count: int, limit: int) -> None:
    """Raise unless a list has 1 to `limit` items."""
    if count == 0:
        raise InvalidRequest(f"{name} is empty; 1 to {limit} are needed", param=name)
    if count > limit:
        raise InvalidValue(f"{name} has {count} items; at most {limit} are allowed", param=name)


def check_choices(n: int | None, config: Config) -> int:
    """The number of choices for each prompt."""
    n = 1 if n is None else n
    limit = config.server.max_choices
    if not 1 <= n <= limit:
        raise InvalidValue(f"n is {n}; it must lie in [1, {limit}] (server.max_choices)", param="n")
    return n


def check_group(requests: int, config: Config) -> None:
    """Raise when a body asks for more completions than are ever served at a time."""
    limit = config.server.max_concurrent_requests
    if requests > limit:
        raise InvalidValue(
            f"the body asks for {requests} completions; at most {limit} are served at a time "
            "(server.max_concurrent_requests)"
        )


def check_supported(body: msgspec.Struct, prefix: str = "") -> None:
    """Raise `InvalidRequest` for a field that we lack, unless its value changes nothing."""
    for name in body.__struct_fields__:
        if name in HARMLESS and not _is_harmless(getattr(body, name), HARMLESS[name]):
            field = f"{prefix}{name}"
            raise InvalidRequest(f"{field} is not supported yet; leave it out", param=field)


def _is_harmless(value: Any, harmless: tuple[Any, ...]) -> bool:
    return value is None or any(type(value) is type(good) and value == good for good in harmless)


def _sampling(fields: GenerationFields, config: Config) -> Sampling:
    defaults = default_sampling(config.generation)
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(fields, name)) is not None}
    sampling = msgspec.structs.replace(defaults, logit_bias=_logit_bias(fields.logit_bias), **given)
    check_sampling(sampling)
    return sampling


def _logit_bias(biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    for key in biases or {}:
        if not _TOKEN_ID.fullmatch(key):
            shown = key if len(key) <= 20 else f"{key[:20]}…"
            raise InvalidValue(f"logit_bias has the key {shown!r}; its keys are token ids", param="logit_bias")
    return tuple((int(key), bias) for key, bias in (biases or {}).items())


def _speculation(asked: bool | SpeculativeOptions | None, model: str, config: Config) -> Speculation:
    default = default_speculation(config.speculation)
    if (configured := config.models.get(model)) and configured.drafter is not None:
        default = msgspec.structs.replace(default, drafter=configured.drafter)
    match asked:
        case None:
            speculation = default
        case False:
            speculation = msgspec.structs.replace(default, drafter="none")
        case True:
            speculation = _switched_on(default)
        case SpeculativeOptions():
            given = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
            speculation = msgspec.structs.replace(_switched_on(default), **given)
    check_speculation(speculation)
    return speculation


def _switched_on(default: Speculation) -> Speculation:
    if default.is_on:
        return default
    return Speculation(
        drafter="auto" if default.drafter == "none" else default.drafter,
        max_draft_tokens=default.max_draft_tokens or None,
    )


def _priority(fields: GenerationFields) -> Priority:
    named = None if fields.priority is None else to_priority(fields.priority)
    if not isinstance(fields, OpenAIFields) or fields.service_tier is None:
        return Priority.NORMAL if named is None else named
    tier = to_priority(fields.service_tier, "service_tier", SERVICE_TIERS)
    if named not in (None, tier):
        raise InvalidRequest(
            f"priority is {fields.priority!r} and service_tier is {fields.service_tier!r}; they say different things, "
            "give one of them",
            param="service_tier",
        )
    return tier


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    check_stop(strings)
    return strings


def _max_tokens(asked: int | None, config: Config) -> int:
    limit = config.generation.max_tokens if asked is None else asked
    if not 1 <= limit <= MAX_MAX_TOKENS:
        raise InvalidValue(f"max_tokens is {limit}; it must lie in [1, {MAX_MAX_TOKENS}]", param="max_tokens")
    return limit
