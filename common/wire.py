"""Bytes to messages and back: one message is one frame of msgpack, checked against its struct when it is read.

No pickle and no extension types; sizes and lengths are capped before anything is built from a frame.
"""

from typing import Any, cast

import msgpack
import msgspec

from common.errors import WireError
from common.messages import (
    FromWorkerData,
    Message,
    ToClientControl,
    ToSupervisor,
    ToWorkerControl,
    ToWorkerData,
)

MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_ARRAY_ITEMS = 2_000_000  # a prompt of token ids may be long
MAX_MAP_ITEMS = 4096


def encode(message: Message) -> bytes:
    """One frame. Raises `WireError` when the message is over `MAX_FRAME_BYTES`."""
    frame: bytes = msgpack.packb(msgspec.to_builtins(message), use_bin_type=True)
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"{type(message).__name__} is {len(frame)} bytes; a frame holds at most {MAX_FRAME_BYTES}")
    return frame


def decode_from_worker(frame: bytes) -> FromWorkerData:
    """Data plane, read by the router. Raises `WireError`, as all of these do."""
    return cast(FromWorkerData, _decode(frame, FromWorkerData))


def decode_to_worker(frame: bytes) -> ToWorkerData:
    """Data plane, read by a worker."""
    return cast(ToWorkerData, _decode(frame, ToWorkerData))


def decode_to_supervisor(frame: bytes) -> ToSupervisor:
    """Control plane, read by the supervisor."""
    return cast(ToSupervisor, _decode(frame, ToSupervisor))


def decode_worker_order(frame: bytes) -> ToWorkerControl:
    """Control plane, read by a worker."""
    return cast(ToWorkerControl, _decode(frame, ToWorkerControl))


def decode_to_client(frame: bytes) -> ToClientControl:
    """Control plane, read by the router or the command line."""
    return cast(ToClientControl, _decode(frame, ToClientControl))


def _decode(frame: bytes, kind: Any) -> Any:
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(f"frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES} are read")
    try:
        return msgspec.convert(_unpack(frame), kind)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, msgspec.ValidationError) as error:
        raise WireError(f"unreadable frame of {len(frame)} bytes: {error}") from error


def _unpack(frame: bytes) -> Any:
    return msgpack.unpackb(
        frame,
        raw=False,
        strict_map_key=True,
        ext_hook=_refuse_extension,
        max_str_len=MAX_FRAME_BYTES,
        max_bin_len=0,
        max_ext_len=0,
        max_array_len=MAX_ARRAY_ITEMS,
        max_map_len=MAX_MAP_ITEMS,
    )


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"extension type {code} in a frame; none is allowed")
