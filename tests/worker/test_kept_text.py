"""Text that is kept for training: whose, how much of it, and who can read it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker import tiny
from worker import kept_text
from worker.kept_text import NEWER, OLDER, KeptText


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    yield tmp_path


def pairs(folder: Path) -> list[tuple[list[int], list[int]]]:
    return [(one.prompt, one.answer) for one in kept_text.conversations(folder)]


def test_only_the_owner_can_read_what_is_kept(home: Path) -> None:
    folder = kept_text.folder_of("owner/name")
    KeptText(folder).keep([1, 2], [3])
    KeptText(folder).keep([4], [5, 6])
    assert folder == home / "texts" / "owner" / "name"
    assert pairs(folder) == [([1, 2], [3]), ([4], [5, 6])]
    assert (folder / NEWER).stat().st_mode & 0o777 == 0o600
    assert [path.stat().st_mode & 0o777 for path in (home / "texts", folder)] == [0o700, 0o700]


def test_the_oldest_text_goes_when_there_is_too_much(home: Path) -> None:
    folder = kept_text.folder_of("tiny")
    kept = KeptText(folder, file_bytes=100)
    for number in range(100, 120):
        kept.keep([number], [1])
    found = pairs(folder)
    assert all((folder / name).stat().st_size <= 100 for name in (OLDER, NEWER))
    assert found == [([number], [1]) for number in range(120 - len(found), 120)] and 3 <= len(found) < 20


def test_a_line_that_was_cut_off_costs_only_itself(home: Path) -> None:
    folder = kept_text.folder_of("tiny")
    KeptText(folder).keep([1], [2])
    with (folder / NEWER).open("ab") as file:
        file.write(b'{"prompt":[1,2\n')
    KeptText(folder).keep([3], [4])
    assert pairs(folder) == [([1], [2]), ([3], [4])]


def test_a_disk_that_takes_nothing_ends_the_keeping_and_nothing_else(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "texts").write_text("a file where the folder should be")
    kept = KeptText(kept_text.folder_of("tiny"))
    kept.keep([1], [2])
    kept.keep([1], [2])
    assert len(caplog.records) == 1 and "No more text is kept" in caplog.text


def test_an_engine_tells_of_answers_that_ended_by_themselves() -> None:
    engine = tiny.make_engine(tiny.make_model("llama"))
    told: list[tuple[list[int], list[int]]] = []
    engine.on_answer = lambda prompt, answer: told.append((list(prompt), list(answer)))
    ended, cancelled = tiny.make_request(1, max_tokens=5), tiny.make_request(2, max_tokens=500)
    for request in (ended, cancelled):
        engine.submit(request)
    outputs: list[int] = []
    while not told:
        outputs += [token for gain in engine.step().gains if gain.request_id == "r1" for token in gain.tokens]
    engine.cancel("r2")
    assert told == [(list(ended.prompt), outputs)] and len(outputs) == 5
