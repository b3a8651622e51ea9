"""A prompt becomes token ids: through the model's chat template, or as it stands."""

from collections.abc import Sequence
from typing import Any

import jinja2

from common.errors import ContextLengthExceeded, InvalidRequest, InvalidValue
from common.messages import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt


def to_tokens(prompt: Prompt, tokenizer: Any, vocabulary: int) -> list[int]:
    """Token ids of a prompt, at least one. Raises `InvalidRequest` for a prompt that the model cannot take."""
    tokens = _encode(prompt, tokenizer, vocabulary)
    if not tokens:
        raise InvalidRequest("the prompt has no tokens: give at least one character", param="prompt")
    return tokens


def check_length(prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> int:
    """How many tokens may be made: `max_tokens`, or what the context leaves.

    Raises `ContextLengthExceeded` when the prompt leaves no room, or `max_tokens` is given and does not fit.
    """
    room = context_tokens - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens; this model's context holds {context_tokens}, answer included: "
            "shorten the prompt",
            param="messages",
        )
    return room if max_tokens is None else min(max_tokens, room)


def _encode(prompt: Prompt, tokenizer: Any, vocabulary: int) -> list[int]:
    match prompt:
        case TokenPrompt(token_ids=ids):
            wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
            if wrong is not None:
                raise InvalidValue(f"token id {wrong} is outside the vocabulary [0, {vocabulary})", param="prompt")
            return list(ids)
        case TextPrompt(text=text):
            return list(tokenizer.encode(text))
        case ChatPrompt(messages=messages, plain_fallback=plain_fallback):
            if tokenizer.chat_template is None:
                if not plain_fallback:
                    raise InvalidRequest(
                        "this model has no chat template: use /v1/completions, or /generate", param="messages"
                    )
                return list(tokenizer.encode(messages[-1].content))
            return _render(messages, tokenizer)


def _render(messages: Sequence[ChatMessage], tokenizer: Any) -> list[int]:
    conversation = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
    return list(tokenizer.encode(text, add_special_tokens=False))
