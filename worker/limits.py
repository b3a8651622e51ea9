"""What this process takes of the machine's memory."""

import ctypes
import os
import sys

import mlx.core as mx
import psutil

_FOOTPRINT_AT = 16 + 7 * 8  # ri_phys_footprint in macOS's struct rusage_info_v0
_RUSAGE_BYTES = 16 + 10 * 8


def footprint_bytes() -> int:
    """What the system charges this process: on macOS the physical footprint, which includes Metal's buffers."""
    if sys.platform == "darwin":
        return _physical_footprint()
    return int(psutil.Process().memory_info().rss)


def active_bytes() -> int:
    """Bytes in live arrays."""
    return int(mx.get_active_memory())


def cache_bytes() -> int:
    """Bytes that MLX keeps for arrays to come."""
    return int(mx.get_cache_memory())


def _physical_footprint() -> int:
    buffer = ctypes.create_string_buffer(_RUSAGE_BYTES)
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    if library.proc_pid_rusage(os.getpid(), 0, buffer) != 0:
        return int(psutil.Process().memory_info().rss)
    return int.from_bytes(buffer.raw[_FOOTPRINT_AT : _FOOTPRINT_AT + 8], sys.byteorder)
