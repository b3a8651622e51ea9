"""The text that a head is trained on: written, answered, served; no row twice, and some of all of it held out."""

from pathlib import Path

import numpy as np
import pytest

from tests.worker.training import language
from worker.kept_text import Conversation
from worker.training import given
from worker.training.corpus import Corpus
from worker.training.dialogue import Dialogue, Frame
from worker.training.given import BadText
from worker.training.synthesis import ANSWER, TEMPLATE, USER, Writer, Written

CHAT = Dialogue((1, 2), (3,), (0, 1, 2), ((9, 9),), frozenset({0}), frozenset({0, 1, 2, 3}))
PROMPTS = [(1, 2, 10, 11, 12, 3), (1, 2, 20, 3), (1, 2, 30, 31, 3)]


def test_each_given_prompt_begins_one_row_and_is_answered_at_once() -> None:
    writer = Writer(language.untrained(), CHAT, rows=4, length=24, seed=5, prompts=PROMPTS)
    rounds = [writer.write(number) for number in range(3)]
    assert [writer.prompts_begun(number) for number in range(4)] == [0, 2, 3, 3]
    found = [
        (prompt, number, by)
        for number, written in enumerate(rounds)
        for row, by in zip(written.tokens.tolist(), written.kinds.tolist(), strict=True)
        for prompt in PROMPTS
        if tuple(row[: len(prompt)]) == prompt
    ]
    assert sorted(prompt for prompt, _, _ in found) == sorted(PROMPTS)
    assert sorted(number for _, number, _ in found) == [0, 0, 1]
    for prompt, _, by in found:
        assert by[: len(prompt)] == [TEMPLATE] * len(prompt) and by[len(prompt)] == ANSWER
    assert all(by[len(CHAT.prefix)] != ANSWER for by in rounds[2].kinds.tolist())  # all other rows begin with a user
    assert (rounds[2].kinds == USER).any()


def test_a_round_is_written_again_as_it_was() -> None:
    once, again = (
        Writer(language.untrained(), CHAT, rows=4, length=24, seed=5, prompts=PROMPTS).write(1) for _ in range(2)
    )
    assert (once.tokens == again.tokens).all() and (once.kinds == again.kinds).all()


def test_long_user_turns_are_made_of_earlier_answers_and_answered_or_gone_on_with() -> None:
    frames = (Frame((40,), (41,), False), Frame((42,), (43,), True))
    talk = Dialogue((1, 2), (3,), (0, 1, 2), (), frozenset({0}), frozenset({0, 1, 2, 3}), frames, gap=(44,))
    texts = [np.array([50, 51, 52, 53]), np.array([60, 61])]
    writer = Writer(language.untrained(), talk, rows=16, length=48, seed=5, prompts=PROMPTS, long_share=0.5)
    written = writer.write(0, texts)
    pairs = list(zip(written.tokens.tolist(), written.kinds.tolist(), strict=True))
    closed = [(row, by) for row, by in pairs if row[2] == 40]
    going_on = [(row, by) for row, by in pairs if row[2] == 42]
    assert len(closed) + len(going_on) == 8 and closed and going_on
    assert sum(tuple(row[: len(prompt)]) == prompt for row, _ in pairs for prompt in PROMPTS) == len(PROMPTS)
    for row, by in closed:
        end = row.index(41)
        assert row[end + 1] == 3 and by[: end + 2] == [TEMPLATE] * (end + 2) and by[end + 2] == ANSWER
    for row, by in going_on:
        end = row.index(43)
        assert by[: end + 1] == [TEMPLATE] * (end + 1) and by[end + 1] == USER
    told = [row[3 : row.index(41)] for row, _ in closed]
    assert all(set(tokens) <= {44, 50, 51, 52, 53, 60, 61} for tokens in told)
    assert max(map(len, told)) <= 24 and any(44 in tokens for tokens in told)  # half of the row is left
    again = Writer(language.untrained(), talk, rows=16, length=48, seed=5, prompts=PROMPTS, long_share=0.5)
    assert (again.write(0, texts).tokens == written.tokens).all()
    nothing = writer.write(0)  # is there to be told
    assert not np.isin(nothing.tokens[:, 2][nothing.kinds[:, 2] == TEMPLATE], [40, 42]).any()


def test_answers_to_be_told_again_are_those_of_all_rows(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(0), 2, ANSWER)
    rows.kinds[0, 30:40] = USER
    corpus = Corpus(tmp_path, 80)
    corpus.add(rows)
    assert [len(text) for text in corpus.answers(30)] == [40, 76]
    assert corpus.answers(30)[0].tolist() == rows.tokens[0, 40:].tolist()


def test_a_long_prompt_takes_nothing_from_its_answers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.synthesis.ANSWER_LIMIT", 10)
    endless = Dialogue((1,), (3,), (0, 1), (), frozenset(), frozenset())
    writer = Writer(language.untrained(), endless, rows=2, length=48, seed=0, prompts=[(1, *[7] * 20, 3)])
    (by,) = [by for by in writer.write(0).kinds.tolist() if by[22] == ANSWER]
    assert by[22:33] == [ANSWER] * 11 and by[33] == TEMPLATE  # ten tokens, and the one that ends the answer


def test_served_text_is_answer_behind_its_prompt() -> None:
    kept = [
        Conversation([1, 5], [*range(6, 16)]),
        Conversation([1] * 30, [2]),  # no room for an answer
        Conversation([2], [3] * 90),
    ]
    rows = given.served(kept, length=40, vocabulary=64)
    assert rows.tokens.shape == rows.kinds.shape == (2, 40)
    assert rows.tokens[0].tolist() == [1, 5, *range(6, 16)] + [0] * 28
    assert rows.kinds[0].tolist() == [TEMPLATE] * 2 + [ANSWER] * 10 + [TEMPLATE] * 28
    assert rows.kinds[1].tolist() == [TEMPLATE] + [ANSWER] * 39


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ([], "no kept text that fits"),
        ([Conversation([1] * 40, [2])], "no kept text that fits"),
        ([Conversation([1], [64])], "another model's"),
    ],
)
def test_kept_text_that_is_of_no_use_is_refused(kept: list[Conversation], says: str) -> None:
    with pytest.raises(BadText, match=says):
        given.served(kept, length=40, vocabulary=64)


def rows_of(random: np.random.Generator, count: int, by: int) -> Written:
    kinds = np.full((count, 80), by, dtype=np.uint8)
    kinds[:, :4] = TEMPLATE
    return Written(random.integers(0, 64, (count, 80), dtype=np.int32), kinds)


def test_a_corpus_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    corpus = Corpus(tmp_path, 80)
    served, first, second = rows_of(random, 20, ANSWER), rows_of(random, 40, ANSWER), rows_of(random, 40, USER)
    assert corpus.add_served(served) == 20 and corpus.add(first) == 40 and corpus.add(second) == 40
    again = Corpus(tmp_path, 80)
    assert (again.rounds, again.rows, again.has_served, again.served_rows) == (2, 100, True, 20)
    for one, other in zip(corpus.split(), again.split(), strict=True):
        assert (one.tokens == other.tokens).all() and (one.kinds == other.kinds).all()
    assert again.add(first) == 0


def test_rows_are_held_out_of_all_parts_and_not_trained_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    corpus = Corpus(tmp_path, 80)
    corpus.add_served(rows_of(random, 40, ANSWER))
    corpus.add(rows_of(random, 60, USER))
    trained, held_out = corpus.split()
    assert len(held_out.tokens) == 5 and len(trained.tokens) == 95
    assert [int(kinds[10]) for kinds in held_out.kinds] == [ANSWER, ANSWER, USER, USER, USER]
    assert not {row.tobytes() for row in trained.tokens} & {row.tobytes() for row in held_out.tokens}


def test_rows_that_differ_only_far_behind_their_given_part_are_duplicates(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(0), 1, ANSWER)
    late, early, other_prompt = (rows.tokens.copy() for _ in range(3))
    late[0, 79], early[0, 20], other_prompt[0, 0] = 99, 99, 99
    corpus = Corpus(tmp_path, 80)
    assert corpus.add(rows) == 1
    assert [corpus.add(Written(tokens, rows.kinds)) for tokens in (late, early, other_prompt)] == [0, 1, 1]
