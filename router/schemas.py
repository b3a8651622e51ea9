"""Request bodies of every surface; `router.body` decodes them, `router.generation` uses them."""

from typing import Any

import msgspec

# A field that clients send and we do not offer yet: taken only with a value that changes nothing.
Unsupported = Any


class SpeculativeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`"speculative": {...}`."""

    drafter: str | None = None
    max_draft_tokens: int | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What every generating route understands; None means the configured default."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    speculative: bool | SpeculativeOptions | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # by token id
    priority: str | None = None  # low, normal or high


# --- our own routes: an unknown field is an error ------------------------------------------------------


class GenerateBody(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /generate. With `raw` the prompt is continued as it is, else it is one user message.

    With `logprobs` each token's log-probability is told, and those of so many alternatives.
    """

    prompt: str
    raw: bool | None = None
    logprobs: int | None = None


class BatchGenerateBody(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /batch_generate."""

    prompts: list[str]
    raw: bool | None = None
    logprobs: int | None = None


class LoadModelBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /models/load: a known `model`, or a new one at `path` (folder or hub id) under `name`."""

    model: str | None = None
    path: str | None = None
    name: str | None = None
    wait: bool = True


class PinModelBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /models/pin: whether a model stays loaded."""

    model: str
    pinned: bool = True


class SearchModelsBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /models/search: models in `state` whose name, path or architecture has all words of `query`."""

    query: str = ""
    state: str | None = None
    limit: int = 50


class GroupBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /groups/{name}."""

    models: list[str]
    default_model: str | None = None
    description: str = ""
    policy: str = "default"


class NamedGroupBody(GroupBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /groups."""

    name: str


class AliasBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PUT /aliases/{name}: the model or group that it stands for."""

    model: str


# --- OpenAI's routes: unknown fields are ignored, known ones that we lack are refused ---------------------


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class OpenAIFields(GenerationFields, frozen=True, kw_only=True):
    """What chat and text completions share."""

    n: int | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None  # OpenAI's word for a priority
    response_format: Unsupported = None
    best_of: Unsupported = None
    min_tokens: Unsupported = None
    stop_token_ids: Unsupported = None


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message; only `text` parts are served."""

    type: str
    text: str | None = None


class ChatTurn(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None


class ChatBody(OpenAIFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions. `show_drafts`, ours: pieces of a stream tell how much of them was drafted."""

    messages: list[ChatTurn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    show_drafts: bool | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None


class CompletionBody(OpenAIFields, frozen=True, kw_only=True):
    """POST /v1/completions. `logprobs` is a number of alternatives here."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: Unsupported = None
    suffix: Unsupported = None


# Values that change nothing, by field.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
}
