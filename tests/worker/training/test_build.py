"""What a build cannot go on with is refused before it has begun, in one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.worker.training import language
from worker.training import build
from worker.training.build import BadBuild, check_length, encoded
from worker.training.corpus import Corpus
from worker.training.openers import PROMPTS
from worker.training.plan import Plan
from worker.training.synthesis import ANSWER, Written


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


class SlowStart:
    """Writes a row a round, in 10 s by its own clock; the first round of its life takes 100."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.rounds = 0

    def write(self, number: int, texts: Any) -> Written:
        self.now_s += 10.0 if self.rounds else 100.0
        self.rounds += 1
        return Written(np.full((1, 32), number + 1), np.full((1, 32), ANSWER, dtype=np.uint8))


def test_making_kernels_takes_no_time_from_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = Plan(minutes=6.0, writing_share=0.5, rows=1, length=32)  # 180 s of writing
    for rounds in (18, 0):  # the second build goes on where there is nothing left to do
        writer: Any = SlowStart()
        monkeypatch.setattr(build.time, "monotonic", lambda now=writer: now.now_s)
        said: list[str] = []
        writing_s, making_s = build._write(writer, Corpus(tmp_path, 32), plan, tmp_path, said.append)
        assert (writer.rounds, writing_s, making_s) == (rounds, 180.0, 90.0)
        assert len(said) == rounds
