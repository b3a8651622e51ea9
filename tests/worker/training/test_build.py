"""What a build cannot go on with is refused before it has begun, in one line."""

from dataclasses import dataclass

import pytest

from tests.worker.training import language
from worker.training.build import BadBuild, check_length, encoded
from worker.training.openers import PROMPTS


@dataclass(frozen=True)
class Letters:
    """A tokenizer without a chat template: a token a letter."""

    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_a_conversation_has_room_for_an_answer_and_fits_the_context() -> None:
    for length in (17, 512):
        check_length(length, language.DIALOGUE, 512)
    for length in (16, 513):
        with pytest.raises(BadBuild, match=rf"--length is {length}; .* must lie in \[17, 512\]"):
            check_length(length, language.DIALOGUE, 512)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_named() -> None:
    assert encoded(["ab", "c" * 72], Letters(), 200) == [[97, 98], [99] * 72]
    with pytest.raises(BadBuild, match="prompt 2 of --prompts has 73 tokens; this model's context leaves 72 "):
        encoded(["ab", "c" * 73], Letters(), 200)


def test_built_in_prompts_are_measured_with_where_none_are_given() -> None:
    assert len(encoded([], Letters(), 200)) == len(PROMPTS)
