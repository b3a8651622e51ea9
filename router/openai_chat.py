"""POST /v1/chat/completions."""

from aiohttp import web
from msgspec import UNSET, UnsetType

from common.errors import InvalidRequest, InvalidValue
from common.messages import ChatMessage, ChatPrompt, Delta
from common.sampling import check_logprobs
from router import generation, openai
from router.answers import Answer, Completion
from router.app_keys import CONFIG
from router.body import read_body
from router.fetching import chosen_model
from router.logprobs import ChatLogprobs, chat_logprobs
from router.schemas import ChatBody, ChatTurn

MAX_MESSAGES = 4096
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES_TO_COME = ("tool", "function")


class AnswerMessage(Answer, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str


class ChatChoice(Answer, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatPiece(Answer, frozen=True, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChunkChoice(Answer, frozen=True, kw_only=True):
    """`drafted_chars`, which only a request with `show_drafts` gets: how much of the piece was drafted."""

    index: int
    delta: ChatPiece
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    drafted_chars: int | UnsetType = UNSET


class ChatDialect:
    """The words of chat completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, shows_drafts: bool = False) -> None:
        self._shows_drafts = shows_drafts

    def whole_choice(self, index: int, completion: Completion) -> Answer:
        message = AnswerMessage(content=completion.text or "")
        found = None if completion.logprobs is None else chat_logprobs(completion.logprobs)
        return ChatChoice(index=index, message=message, finish_reason=completion.ended.reason, logprobs=found)

    def first_piece(self, index: int) -> Answer | None:
        return ChunkChoice(index=index, delta=ChatPiece(role="assistant", content=""))

    def piece(self, index: int, delta: Delta) -> Answer:
        found = chat_logprobs(delta.logprobs) if delta.logprobs else None
        drafted = delta.drafted_chars if self._shows_drafts else UNSET
        return ChunkChoice(index=index, delta=ChatPiece(content=delta.text), logprobs=found, drafted_chars=drafted)

    def last_piece(self, index: int, reason: str) -> Answer:
        return ChunkChoice(index=index, delta=ChatPiece(), finish_reason=reason)


async def create(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, ChatBody)
    config = request.app[CONFIG]
    generation.check_supported(body)
    generation.check_count("messages", len(body.messages), MAX_MESSAGES)
    choices = generation.check_choices(body.n, config)
    generation.check_group(choices, config)
    prompt = ChatPrompt(messages=tuple(_message(number, turn) for number, turn in enumerate(body.messages)))
    model = await chosen_model(request, body.model)
    generates = generation.build(
        request,
        body,
        [prompt],
        model=model,
        choices=choices,
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
    )
    return await openai.answer(
        request,
        ChatDialect(shows_drafts=bool(body.show_drafts)),
        model,
        generates,
        choices=choices,
        is_stream=bool(body.stream),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _max_tokens(body: ChatBody) -> int | None:
    """`max_tokens` under either of its names."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens is {old} and max_completion_tokens is {new}; they mean the same, give one of them",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _logprobs(body: ChatBody) -> int | None:
    """The number of alternatives to tell, None without `logprobs`."""
    if body.logprobs:
        check_logprobs("top_logprobs", body.top_logprobs or 0)
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} without logprobs; set logprobs to true", param="top_logprobs"
        )
    return None


def _message(number: int, turn: ChatTurn) -> ChatMessage:
    place = f"messages[{number}]"
    generation.check_supported(turn, prefix=f"{place}.")
    if turn.role in ROLES_TO_COME:
        raise InvalidRequest(f"{place}.role {turn.role!r} is not supported yet", param=f"{place}.role")
    if turn.role not in ROLES:
        raise InvalidValue(f"{place}.role is {turn.role!r}; possible: {', '.join(ROLES)}", param=f"{place}.role")
    return ChatMessage(role=ROLES[turn.role], content=_content(f"{place}.content", turn))


def _content(name: str, turn: ChatTurn) -> str:
    if turn.content is None:
        raise InvalidRequest(f"{name} is missing", param=name)
    if isinstance(turn.content, str):
        return turn.content
    texts = []
    for number, part in enumerate(turn.content):
        place = f"{name}[{number}]"
        if part.type != "text":
            raise InvalidRequest(f"{place}: parts of type {part.type!r} are not supported yet", param=place)
        if part.text is None:
            raise InvalidRequest(f"{place}.text is missing", param=f"{place}.text")
        texts.append(part.text)
    return "".join(texts)
