"""What a model's chat template puts around its turns, so that the model can write both sides of a conversation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from worker import loader
from worker.training.openers import AROUND_TEXTS, OPENERS

_USER, _ANSWER, _NEXT = "QXUSERXQ", "QXANSWERXQ", "QXNEXTXQ"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Token ids: `prefix` up to the first user turn, `middle` from its end to the answer, `between` to the next turn.

    `openers`: beginnings of user turns; `frames` stand around longer texts in them, between which is `gap`. `ends`:
    tokens that end an answer; `specials` end a user turn, too. Without a chat template `middle` is empty: all text is
    answer.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    between: tuple[int, ...]
    openers: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    specials: frozenset[int]
    frames: tuple["Frame", ...] = ()
    gap: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and behind longer texts, as token ids, and whether the user turn goes on after that."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    goes_on: bool


def of(tokenizer: Any, config: dict[str, Any]) -> Dialogue:
    """The dialogue of a loaded model."""
    ends = loader.end_tokens(tokenizer, config)
    specials = ends | frozenset(getattr(tokenizer, "all_special_ids", None) or [])

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    openers = tuple(encode(text) for text in OPENERS)
    frames = tuple(Frame(encode(before), encode(behind), goes_on) for before, behind, goes_on in AROUND_TEXTS)
    gap = encode("\n\n")
    end = min(ends, default=0)
    if tokenizer.chat_template is None:
        start = tuple(tokenizer.encode("")) or (end,)
        return Dialogue(start, (), (end, *start), openers, ends, specials, frames, gap)
    prefix, middle = _parts(tokenizer, [("user", _USER)], True)
    between = _between(tokenizer, encode, fallback=(end, *encode(prefix)))
    return Dialogue(encode(prefix), encode(middle), between, openers, ends, specials, frames, gap)


def _between(tokenizer: Any, encode: Callable[[str], tuple[int, ...]], fallback: tuple[int, ...]) -> tuple[int, ...]:
    """What stands between an answer and the next user turn; templates of single turns begin anew."""
    try:
        parts = _parts(tokenizer, [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)], False)
    except (jinja2.TemplateError, ValueError, TypeError):
        return fallback
    return encode(parts[2]) if len(parts) == 4 and parts[2] else fallback


def _parts(tokenizer: Any, turns: Sequence[tuple[str, str]], is_prompt: bool) -> list[str]:
    """The rendered conversation, split at its turns' contents."""
    conversation = [{"role": role, "content": content} for role, content in turns]
    rest: str = tokenizer.apply_chat_template(conversation, add_generation_prompt=is_prompt, tokenize=False)
    parts: list[str] = []
    for _, content in turns:
        before, _, rest = rest.partition(content)
        parts.append(before)
    return [*parts, rest]


def prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user turn, ready for the answer."""
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text))
    conversation = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(rendered, add_special_tokens=False))
