"""Text from elsewhere: files of prompts, and what the model was asked and answered when it served."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from common.errors import ConfigError
from worker.kept_text import Conversation
from worker.training.synthesis import ANSWER, TEMPLATE, Written

LEAST_ANSWER = 32  # tokens of an answer that a row has to have room for


class BadText(ConfigError):
    """A file of prompts, or kept text, cannot be used."""


class _Question(msgspec.Struct):
    turns: list[str]


def read_prompts(file: Path) -> list[str]:
    """One a line, as text, or in a .jsonl file as objects whose `turns` begin with it. Raises `BadText`."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadText(f"{file} is not text in UTF-8: {error}") from error
    if not lines:
        raise BadText(f"{file} has no prompts: give at least one, one a line")
    if file.suffix != ".jsonl":
        return lines
    try:
        return [msgspec.json.decode(line, type=_Question).turns[0] for line in lines]
    except (msgspec.DecodeError, IndexError) as error:
        raise BadText(f'{file}: every line has to be like {{"turns": ["a prompt"]}}: {error}') from error


def with_room(prompts: Iterable[Sequence[int]], length: int) -> list[Sequence[int]]:
    """Those prompts (token ids) that leave an answer room in a row of `length` tokens."""
    return [prompt for prompt in prompts if len(prompt) + LEAST_ANSWER <= length]


def served(conversations: Iterable[Conversation], length: int, vocabulary: int) -> Written:
    """Rows of `length` tokens of what was served; those whose prompt leaves no room are left out.

    Raises `BadText` for tokens that the model does not have, or when nothing is left.
    """
    rows, kinds = [], []
    for one in conversations:
        if len(one.prompt) + LEAST_ANSWER > length:
            continue
        tokens = np.array([*one.prompt, *one.answer][:length], dtype=np.int64)
        if tokens.max() >= vocabulary or tokens.min() < 0:
            raise BadText(
                f"the kept text has token {tokens.max()}, the model's vocabulary {vocabulary} tokens: it is another "
                "model's, delete it"
            )
        missing = length - len(tokens)
        by = np.full(len(tokens), ANSWER, dtype=np.uint8)
        by[: len(one.prompt)] = TEMPLATE
        rows.append(np.pad(tokens, (0, missing)).astype(np.int32))
        kinds.append(np.pad(by, (0, missing)))
    if not rows:
        raise BadText(
            "there is no kept text that fits: set keep_text = true in [models.NAME], let the model answer, and see "
            "that --length holds its prompts"
        )
    return Written(np.stack(rows), np.stack(kinds))
