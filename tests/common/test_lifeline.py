"""The lifeline: a child hears of the death of the process that holds the pipe's other end."""

import os
import threading

import pytest

from common import lifeline


def test_end_of_file_calls() -> None:
    called = threading.Event()
    read_end, write_end = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(lifeline.VARIABLE, str(read_end))
        lifeline.watch(called.set)
    assert not called.wait(0.05)
    os.close(write_end)
    assert called.wait(5)
    os.close(read_end)


def test_without_a_supervisor_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lifeline.VARIABLE, raising=False)
    before = threading.active_count()
    lifeline.watch(lambda: pytest.fail("called"))
    assert threading.active_count() == before
