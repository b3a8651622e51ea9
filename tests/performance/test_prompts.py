"""The benchmark's prompts: edit tasks from our own files, and questions chosen by category."""

import json
from pathlib import Path

import pytest

from tests.performance import prompts
from tests.performance.bench import others_than


def test_edit_tasks_are_our_own_files_with_a_name_to_change() -> None:
    tasks = prompts.edits()
    assert len(set(tasks)) == len(tasks) >= 16
    for task in tasks:
        order, text = task.split("\n\n", 1)
        old, new = order.split("`")[1::2]
        assert text.count(old) > 1
        assert new not in text
        assert len(text.split("\n")) == prompts.EDIT_LINES


def test_the_name_to_change_is_the_commonest_that_is_not_pythons_own() -> None:
    code = "for row in rows:\n    # it it it it\n    print(self, row, self, print('broken off"
    assert prompts.commonest_name(code) == "row"


def test_questions_are_chosen_by_category_and_length(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    questions = [("rag", "a" * 30), ("rag", "b"), ("qa", "c"), ("math", "d")]
    file.write_text("\n".join(json.dumps({"category": c, "turns": [t, "more"]}) for c, t in questions))
    assert prompts.read(file, 10) == ["b", "c", "d"]
    assert prompts.read(file, 10, ["rag", "math"]) == ["b", "d"]
    assert prompts.read(file, 100, ["rag"]) == ["a" * 30, "b"]
    with pytest.raises(ValueError, match="no category poems; it has math, qa, rag"):
        prompts.read(file, 10, ["poems", "qa"])


def test_who_warms_up_is_asked_what_is_not_measured() -> None:
    file = [f"question {number}" for number in range(10)]
    assert set(others_than(file[:4], file, 3)) < set(file[4:])
    more = others_than([*file[:4], prompts.PROMPTS[0]], file, 12)
    assert len(set(more)) == len(more) == 12
    assert not set(more) & {*file[:4], prompts.PROMPTS[0]}
