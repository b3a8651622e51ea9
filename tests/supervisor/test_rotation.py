"""Logs stay short while their writers go on."""

from pathlib import Path

from common.config import LogConfig
from router.supervisor import rotation
from router.supervisor.process import last_error, open_log


def test_rotated_log_goes_on_with_the_same_writer(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    with open_log(path) as log:
        for word in (b"one", b"two", b"three", b"four"):
            log.write(word)
            log.flush()
            rotation.rotate(path, backups=2)
        log.write(b"five")
        log.flush()
    assert path.read_bytes() == b"five"
    assert (tmp_path / "worker.log.1").read_bytes() == b"four"
    assert (tmp_path / "worker.log.2").read_bytes() == b"three"
    assert not (tmp_path / "worker.log.3").exists()
    assert (tmp_path / "worker.log.1").stat().st_mode & 0o777 == 0o600


def test_only_logs_that_grew_too_long_are_rotated(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    long, short = tmp_path / "models" / "long.log", tmp_path / "short.log"
    long.write_bytes(b"x" * 11)
    short.write_bytes(b"x" * 10)
    rotation.rotate_long(tmp_path, LogConfig(max_bytes=10, backups=1))
    assert long.stat().st_size == 0
    assert long.with_name("long.log.1").read_bytes() == b"x" * 11
    assert short.stat().st_size == 10


def test_last_error_is_found_in_a_log_that_was_cut_after_the_spawn(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("2026-01-01 00:00:00,000 ERROR   worker: it broke\n")
    assert last_error(path, offset=10_000) == "it broke"
