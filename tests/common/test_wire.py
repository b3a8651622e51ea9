"""Wire format: every message survives the way, and nothing else gets through."""

from collections.abc import Callable
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages, wire
from common.errors import WireError
from common.messages import (
    Accepted,
    AskHello,
    Cancel,
    ChatMessage,
    ChatPrompt,
    Delta,
    Deltas,
    DrafterLoad,
    Drain,
    EnsureModel,
    Exit,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Load,
    Message,
    ModelEntry,
    ModelFacts,
    ModelTable,
    Pin,
    Reload,
    Reply,
    SetLimits,
    StateChanged,
    Status,
    TextPrompt,
    Timings,
    TokenPrompt,
    Unload,
    Usage,
    Watch,
    WorkerEntry,
    WorkerHello,
)
from common.priority import Priority
from common.sampling import MAX_SEED, Sampling, Speculation
from common.states import WorkerState

FACTS = ModelFacts(
    architecture="llama",
    context_tokens=8192,
    vocabulary=49152,
    weights_dtype="float32",
    weights_bytes=2**40,
    kv_bytes_per_token=46080,
    backend="OpenBLAS",
    has_chat_template=True,
    drafters=("ngram",),
    load_s=1.5,
    kv_bits=8,
)
WORKER = WorkerEntry(identity="m#1", token="t", state=WorkerState.READY, pid=7, running=2)
ENTRY = ModelEntry(name="m", path="/m", state=WorkerState.BACKOFF, retry_after_s=1.5, facts=FACTS, workers=(WORKER,))
EXAMPLES: list[Message] = [
    WorkerHello(identity="m#1", token="t", model="m", pid=7),
    Accepted(request_id="r", prompt_tokens=3),
    Deltas(step=9, items=(Delta(request_id="r", token_ids=(1, 2), text="né \N{GRINNING FACE}"),)),
    Finished(
        request_id="r",
        reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=2, drafted_tokens=4, accepted_tokens=1, steps=1),
        timings=Timings(queue_s=0.5, plain_decode_s=1.0),
    ),
    Failed(request_id="r", code="invalid_value", message="top_p is 7", param="top_p"),
    Load(
        running=1,
        waiting=2,
        outstanding_tokens=3,
        kv_bytes=4,
        steps=5,
        prompt_tokens=6,
        generated_tokens=7,
        drafted_tokens=8,
        accepted_tokens=9,
        speedup=1.5,
        prefix_hits=10,
        prefix_bytes=2**33,
        preempted=11,
        drafters=(DrafterLoad(name="suffix", drafted=3, accepted=2, judged=(1, 1), stood=(1, 1)),),
        parked=1,
        probes=1,
    ),
    Generate(request_id="r", prompt=TextPrompt(text="Hi"), sampling=Sampling(seed=MAX_SEED)),
    Generate(request_id="r", prompt=TextPrompt(text="Hi"), sampling=Sampling(), priority=Priority.LOW),
    Generate(
        request_id="r",
        prompt=ChatPrompt(messages=(ChatMessage(role="user", content="Hi"),), plain_fallback=True),
        sampling=Sampling(temperature=0.7),
        max_tokens=5,
        stop=("\n",),
        speculation=Speculation(drafter="none"),
        resume=(1, 2, 3),
    ),
    Generate(request_id="r", prompt=TokenPrompt(token_ids=(0, 2**31)), sampling=Sampling()),
    Cancel(request_id="r"),
    AskHello(),
    StateChanged(state=WorkerState.READY, detail="d", facts=FACTS),
    Heartbeat(
        loop_seq=2**40,
        phase="decode",
        running=1,
        waiting=0,
        finished=3,
        active_bytes=4,
        cache_bytes=5,
        footprint_bytes=6,
    ),
    SetLimits(kv_bytes=2**35, cache_bytes=2**30),
    Drain(),
    Exit(),
    Watch(client="cli"),
    EnsureModel(call_id="c", name="m", path="org/m"),
    Unload(call_id="c", name="m"),
    Pin(call_id="c", name="m", pinned=True),
    Reload(call_id="c"),
    Status(call_id="c"),
    ModelTable(revision=1, default_model="m", memory_budget_bytes=2**34, models=(ENTRY,)),
    Reply(call_id="c", code="not_found", message="no"),
]
READERS: list[tuple[Any, Callable[[bytes], Message]]] = [
    (messages.FromWorkerData, wire.decode_from_worker),
    (messages.ToWorkerData, wire.decode_to_worker),
    (messages.ToSupervisor, wire.decode_to_supervisor),
    (messages.ToWorkerControl, wire.decode_worker_order),
    (messages.ToClientControl, wire.decode_to_client),
]


def readers_of(message: Message) -> list[Callable[[bytes], Message]]:
    return [reader for kinds, reader in READERS if isinstance(message, kinds)]


def test_every_message_has_an_example() -> None:
    kinds = {kind for union, _ in READERS for kind in get_args(union)}
    assert {type(example) for example in EXAMPLES} == kinds


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_message_survives_the_way(message: Message) -> None:
    readers = readers_of(message)
    assert readers
    for reader in readers:
        assert reader(wire.encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_message_of_another_plane_is_refused(message: Message) -> None:
    for _, reader in READERS:
        if reader not in readers_of(message):
            with pytest.raises(WireError):
                reader(wire.encode(message))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"hello",
        msgpack.packb(7),
        msgpack.packb([]),
        msgpack.packb({}),
        msgpack.packb({"type": "Nonsense"}),
        msgpack.packb({"type": "Cancel"}),
        msgpack.packb({"type": "Cancel", "request_id": 7}),
        msgpack.packb({"type": "Cancel", "request_id": None}),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": "Cancel", "request_id": b"raw"}),
        msgpack.packb({"type": "Cancel", "request_id": "r"}) + b"\x00",
        msgpack.packb({"type": "Cancel", "request_id": msgpack.ExtType(1, b"x")}),
        msgpack.packb({"type": "Cancel", "request_id": msgpack.Timestamp(1)}),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        msgpack.packb({"type": "Cancel", "request_id": "\x00"}).replace(b"\x00", b"\xff"),
        msgpack.packb({"type": "Cancel", "request_id": [[]] * (wire.MAX_ARRAY_ITEMS + 1)}),
        msgpack.packb({str(n): n for n in range(wire.MAX_MAP_ITEMS + 1)}),
    ],
    ids=range(22),
)
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_to_worker(frame)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_wire_error(frame: bytes) -> None:
    for _, reader in READERS:
        with pytest.raises(WireError):
            reader(frame)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_frame_is_read_as_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for _, reader in READERS:
        try:
            assert isinstance(reader(bytes(frame)), Message)
        except WireError:
            continue


def test_oversized_frame_is_neither_written_nor_read() -> None:
    text = "x" * wire.MAX_FRAME_BYTES
    with pytest.raises(WireError, match=str(wire.MAX_FRAME_BYTES)):
        wire.encode(Failed(request_id="r", code="c", message=text))
    with pytest.raises(WireError, match=str(wire.MAX_FRAME_BYTES)):
        wire.decode_to_worker(bytes(wire.MAX_FRAME_BYTES + 1))


@settings(max_examples=100, deadline=None)
@given(st.text(), st.lists(st.integers(0, 2**31), max_size=20), st.integers(0, MAX_SEED))
def test_any_text_and_any_tokens_survive(text: str, tokens: list[int], seed: int) -> None:
    message = Generate(
        request_id="r",
        prompt=TextPrompt(text=text),
        sampling=Sampling(seed=seed),
        stop=(text,),
        resume=tuple(tokens),
    )
    assert wire.decode_to_worker(wire.encode(message)) == message
