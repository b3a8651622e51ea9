"""What the I/O thread makes of a step's gains: deltas whose tokens, text and log-probabilities belong together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from worker.detokenize import Detokenizer, TextStream
from worker.engine import Gain
from worker.io_thread import IoThread, Name, Served
from worker.logprobs import Logprob
from worker.loop import CancelRequest, Pulse
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
