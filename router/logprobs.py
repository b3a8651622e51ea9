"""Log-probabilities in the words of each surface."""

from collections.abc import Iterable

from common.messages import ChosenLogprob, TokenLogprob
from router.answers import Answer


class ChatAlternative(Answer, frozen=True, kw_only=True):
    """A token in chat completions; `bytes` are exact where `token` cannot be (a part of a character)."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatAlternative, frozen=True, kw_only=True):
    top_logprobs: list[ChatAlternative]


class ChatLogprobs(Answer, frozen=True, kw_only=True):
    """`logprobs` of chat completions."""

    content: list[ChatToken]
    refusal: None = None


class TextLogprobs(Answer, frozen=True, kw_only=True):
    """`logprobs` of text completions: four lists with an item for each token.

    `top_logprobs` has the token itself, too; `text_offset` counts the characters of the answer before the token.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class NativeAlternative(ChatAlternative, frozen=True, kw_only=True):
    token_id: int


class NativeLogprob(NativeAlternative, frozen=True, kw_only=True):
    """A token of an answer of our own routes."""

    text_offset: int
    top_logprobs: list[NativeAlternative]


def chat_logprobs(tokens: Iterable[ChosenLogprob]) -> ChatLogprobs:
    """As chat completions tell them."""
    return ChatLogprobs(
        content=[
            ChatToken(
                token=token.text,
                logprob=token.logprob,
                bytes=_bytes(token),
                top_logprobs=[ChatAlternative(token=t.text, logprob=t.logprob, bytes=_bytes(t)) for t in token.top],
            )
            for token in tokens
        ]
    )


def text_logprobs(tokens: Iterable[ChosenLogprob]) -> TextLogprobs:
    """As text completions tell them."""
    tokens = list(tokens)
    return TextLogprobs(
        tokens=[_label(token) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{_label(each): each.logprob for each in (token, *token.top)} for token in tokens],
        text_offset=[token.text_offset for token in tokens],
    )


def native_logprobs(tokens: Iterable[ChosenLogprob]) -> list[NativeLogprob]:
    """As our own routes tell them."""
    return [
        NativeLogprob(
            token=token.text,
            token_id=token.token_id,
            logprob=token.logprob,
            bytes=_bytes(token),
            text_offset=token.text_offset,
            top_logprobs=[
                NativeAlternative(token=t.text, token_id=t.token_id, logprob=t.logprob, bytes=_bytes(t))
                for t in token.top
            ],
        )
        for token in tokens
    ]


def _bytes(token: TokenLogprob) -> list[int]:
    return list(token.raw or token.text.encode())


def _label(token: TokenLogprob) -> str:
    """A name that differs between parts of characters, in OpenAI's notation."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw) if token.raw else token.text
