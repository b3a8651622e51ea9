"""What the I/O thread makes of a step's gains: deltas whose tokens, text and log-probabilities belong together."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from common import sockets, wire
from common.config import Config
from common.messages import WorkerHello
from tests.fakes import short_run_dir
from worker.detokenize import Detokenizer, TextStream
from worker.engine import Gain
from worker.io_thread import IoThread, Name, Served
from worker.loop import CancelRequest, Pulse
from worker.report import StepReport
from worker.sampling.logprobs import Logprob
from worker.token_text import TokenTexts

END = 0


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>"


@pytest.fixture
def thread() -> Iterator[IoThread]:
    """One that was never started; of what it serves it needs the tokenizer."""
    thread = IoThread(Name("m#1", "", "m", 1), Path("/nonexistent"), Config(), Pulse())
    unused: Any = None
    thread._served = Served(unused, Bytes(), unused, frozenset({END}), TokenTexts(Bytes()))
    yield thread
    thread._loop.close()


def stream(*stop: str) -> TextStream:
    return TextStream(Detokenizer(Bytes().decode), stop, frozenset({END}))


def gain(text: str, end: bool = False, finish: str | None = None) -> Gain:
    tokens = (*text.encode(), END) if end else tuple(text.encode())
    return Gain("r", tokens, finish=finish, logprobs=tuple(Logprob(-float(t), ((t, -float(t)),)) for t in tokens))


def test_each_token_has_its_log_probability_and_offset(thread: IoThread) -> None:
    delta = thread._advance(stream(), gain("né!", end=True, finish="stop"))
    assert delta is not None
    assert delta.text == "né!"
    assert [told.token_id for told in delta.logprobs] == list(delta.token_ids) == [*"né!".encode(), END]
    assert [told.logprob for told in delta.logprobs] == [-float(token) for token in delta.token_ids]
    assert [told.text_offset for told in delta.logprobs] == [0, 1, 1, 2, 3]
    assert [told.raw for told in delta.logprobs] == [(), (0xC3,), (0xA9,), (), ()]
    assert [told.top[0].token_id for told in delta.logprobs] == list(delta.token_ids)


def test_what_comes_after_a_stop_string_is_not_told(thread: IoThread) -> None:
    delta = thread._advance(stream("ST"), gain("ab STop"))
    assert delta is not None
    assert delta.text == "ab "
    assert [told.text for told in delta.logprobs] == ["a", "b", " ", "S", "T"]
    assert len(delta.token_ids) == 5
    assert thread.orders.get_nowait() == CancelRequest("r")


def test_a_resumed_stream_goes_on_with_the_offsets(thread: IoThread) -> None:
    resumed = stream()
    resumed.push(list("né".encode()))
    delta = thread._advance(resumed, gain("xy"))
    assert delta is not None
    assert [told.text_offset for told in delta.logprobs] == [2, 3]


def test_nobody_who_does_not_ask_is_told(thread: IoThread) -> None:
    delta = thread._advance(stream(), Gain("r", tuple(b"ab")))
    assert delta is not None
    assert (delta.text, delta.logprobs) == ("ab", ())


def report(text: str, finish: str | None = None) -> StepReport:
    return StepReport(step=1, gains=(Gain("r", tuple(text.encode()), finish=finish),))


async def test_router_that_does_not_read_loses_whole_requests_not_frames(
    thread: IoThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent has no gap, no end without its tokens, and a hello after it: the router does the request over."""
    monkeypatch.setattr(sockets, "SEND_QUEUE_MESSAGES", 10)
    with (
        short_run_dir() as run_dir,
        zmq.asyncio.Context() as context,
        sockets.bind_router(context, run_dir / sockets.DATA_SOCKET) as router,
        sockets.connect_dealer(context, run_dir / sockets.DATA_SOCKET, "m#1") as thread._data,
    ):
        await thread._data.send(wire.encode(thread._hello()))
        thread._streams["r"] = stream()
        sent = 0
        while "r" in thread._streams:
            thread._on_report(report(f"{sent:06};"))
            sent += 1
            assert sent < 100_000
        assert thread.orders.get_nowait() == CancelRequest("r")
        thread._on_report(report("lost", finish="length"))
        messages: list[Any] = []
        while not messages or len(messages) == 1 or not isinstance(messages[-1], WorkerHello):
            async with asyncio.timeout(5):
                messages.append(wire.decode_from_worker((await router.recv_multipart())[1]))
        texts = [message.items[0].text for message in messages[1:-1]]
        assert 0 < len(texts) < sent
        assert texts == [f"{number:06};" for number in range(len(texts))]


async def test_end_that_finds_no_router_is_dropped_with_its_request(thread: IoThread) -> None:
    with (
        short_run_dir() as run_dir,
        zmq.asyncio.Context() as context,
        sockets.connect_dealer(context, run_dir / sockets.DATA_SOCKET, "m#1") as thread._data,
    ):
        thread._streams |= {"r": stream(), "other": stream()}
        thread._on_report(report("x", finish="length"))
        assert thread._streams == {}
        with sockets.bind_router(context, run_dir / sockets.DATA_SOCKET) as router:
            async with asyncio.timeout(5):
                assert isinstance(wire.decode_from_worker((await router.recv_multipart())[1]), WorkerHello)
