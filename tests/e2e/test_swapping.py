"""Two models that do not fit together, and clients that want now the one, now the other."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.server import Serve
from tests.e2e.tiny_model import write_model

BUDGET_GB = 0.35  # one worker takes about 0.2
TURN_S = 3.0
LOADED_S = 25.0


@pytest.fixture
def serve(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    for seed, name in enumerate(("a", "b")):
        write_model(tmp_path / name, demo_model, seed)
    monkeypatch.setenv("MEMORY_LIMIT_GB", str(BUDGET_GB))
    monkeypatch.setenv("MLXSPEC_BLAS", "reference")  # the same bits in every batch
    server = Serve(tmp_path, f"[supervisor]\nturn_s = {TURN_S}\n")
    yield server
    server.close()


class MemoryCurve:
    """Samples what the worker processes hold together, until it is ended."""

    def __init__(self, serve: Serve) -> None:
        self.highest_bytes = 0
        self.most_workers = 0
        self._serve, self._is_ended = serve, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        top = psutil.Process(self._serve.process.pid)
        while not self._is_ended.wait(0.05):
            sizes = []
            for child in top.children():
                try:
                    if "worker" in child.cmdline():
                        sizes.append(child.memory_info().rss)
                except psutil.Error:
                    continue
            self.highest_bytes = max(self.highest_bytes, sum(sizes))
            self.most_workers = max(self.most_workers, len(sizes))

    def end(self) -> None:
        self._is_ended.set()
        self._thread.join()


def test_two_models_that_are_never_idle_take_turns(serve: Serve) -> None:
    """Each has three clients that ask all the time; both get answers, nobody an error, and swaps stay rare."""
    serve.wait_ready()
    curve = MemoryCurve(serve)
    began = time.monotonic()
    ends_at = began + LOADED_S

    def client(number: int) -> list[tuple[str, int, str]]:
        name, answers = "ab"[number % 2], []
        body = {"model": name, "prompt": "Once upon a time", "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        while time.monotonic() < ends_at:
            status, answer = serve.request("POST", "/generate", body)
            answers.append((name, status, answer.get("text", str(answer))))
        return answers

    with ThreadPoolExecutor(6) as clients:
        answers = [one for some in clients.map(client, range(6)) for one in some]
    took_s = time.monotonic() - began  # the last answers come after the end
    curve.end()
    load_s = max(serve.request("GET", f"/models/{name}")[1]["facts"]["load_s"] for name in "ab")
    swaps = serve.output().count(" is unloaded")
    served = {name: sum(who == name for who, _, _ in answers) for name in "ab"}
    print(f"{served} answers, {swaps} swaps in {took_s:.1f} s, a load takes {load_s:.1f} s")
    assert {status for _, status, _ in answers} == {200}, [one for one in answers if one[1] != 200][:3]
    assert {name: len({text for who, _, text in answers if who == name}) for name in "ab"} == {"a": 1, "b": 1}
    assert min(served.values()) >= 3, served
    assert 1 <= swaps <= 1 + took_s / TURN_S, serve.output()
    assert curve.most_workers == 1


def test_ten_clients_of_two_models_that_do_not_fit_together_see_no_error(serve: Serve) -> None:
    serve.wait_ready()
    curve = MemoryCurve(serve)
    bodies = {
        name: {"model": name, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        for name in "ab"
    }

    def client(number: int) -> list[tuple[str, int, str]]:
        answers = []
        for turn in range(2):
            name = "ab"[(number + turn) % 2]
            status, answer = serve.request("POST", "/generate", bodies[name])
            answers.append((name, status, answer.get("text", str(answer))))
        return answers

    began = time.monotonic()
    with ThreadPoolExecutor(10) as clients:
        answers = [one for some in clients.map(client, range(10)) for one in some]
    curve.end()
    swaps = serve.output().count(" is unloaded")
    assert [status for _, status, _ in answers] == [200] * 20, answers
    assert {name: len({text for who, _, text in answers if who == name}) for name in "ab"} == {"a": 1, "b": 1}
    assert swaps >= 2, serve.output()
    assert curve.highest_bytes < BUDGET_GB * 2**30, (curve.highest_bytes, time.monotonic() - began)
    assert curve.most_workers == 1
