"""The logs of a folder: last lines, added lines, and files that are cut meanwhile."""

from pathlib import Path

from router.service.log_tail import LogTail


def test_last_lines_are_ordered_by_time(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("2026-01-01 00:00:01,000 one\n2026-01-01 00:00:03,000 three\n")
    (tmp_path / "b.log").write_text("2026-01-01 00:00:02,000 two\n")
    assert [line.split()[-1] for _, line in LogTail(tmp_path).last(5)] == ["one", "two", "three"]
    assert [line.split()[-1] for _, line in LogTail(tmp_path).last(1)] == ["two", "three"]


def test_added_lines_come_once_and_only_whole(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n")
    tail = LogTail(tmp_path)
    assert list(tail.last(0)) == []
    with log.open("a") as file:
        file.write("new\nhal")
        file.flush()
        assert list(tail.added()) == [("a", "new")]
        file.write("f\n")
    assert list(tail.added()) == [("a", "half")]
    assert list(tail.added()) == []


def test_cut_log_and_new_log_begin_anew(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("much that was said before\n")
    tail = LogTail(tmp_path)
    list(tail.last(1))
    log.write_text("cut\n")
    (tmp_path / "b.log").write_text("born\n")
    assert list(tail.added()) == [("a", "cut"), ("b", "born")]
