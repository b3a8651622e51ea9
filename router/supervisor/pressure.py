"""What the operating system says of the whole machine's memory, whoever uses it.

macOS has a level of its own; on Linux it is told from what is available and from how long processes stalled for
want of memory (PSI).
"""

import ctypes
import re
import sys
from enum import IntEnum
from pathlib import Path

WARN_AVAILABLE, CRITICAL_AVAILABLE = 0.08, 0.03  # parts of the machine's memory
STALLED_PERCENT = 20.0  # of the last ten seconds, all processes waited for memory
_AVG10 = re.compile(r"^full avg10=([0-9.]+)", re.MULTILINE)
_MEMINFO = re.compile(r"^(MemTotal|MemAvailable): +(\d+) kB", re.MULTILINE)


class Pressure(IntEnum):
    """The levels and numbers of macOS."""

    NORMAL = 1
    SHORT = 2
    CRITICAL = 4


def read() -> Pressure:
    """The level now; NORMAL where it cannot be told."""
    if sys.platform == "darwin":
        return from_level(read_sysctl("kern.memorystatus_vm_pressure_level"))
    return from_linux(_text("/proc/meminfo"), _text("/proc/pressure/memory"))


def from_level(level: int) -> Pressure:
    """macOS's number as a level."""
    return Pressure(level) if level in set(Pressure) else Pressure.NORMAL


def from_linux(meminfo: str, stalls: str) -> Pressure:
    """The level that /proc/meminfo and /proc/pressure/memory tell together; either may be empty."""
    sizes = {name: int(size) for name, size in _MEMINFO.findall(meminfo)}
    total = sizes.get("MemTotal", 0)
    available = sizes.get("MemAvailable", total) / total if total else 1.0
    found = _AVG10.search(stalls)
    is_stalling = found is not None and float(found[1]) >= STALLED_PERCENT
    if available < CRITICAL_AVAILABLE or (is_stalling and available < WARN_AVAILABLE):
        return Pressure.CRITICAL
    return Pressure.SHORT if is_stalling or available < WARN_AVAILABLE else Pressure.NORMAL


def read_sysctl(name: str) -> int:
    """An integer of macOS's sysctl, 0 where there is none of that name."""
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    library = ctypes.CDLL(None)
    if library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return 0
    return int(value.value) if size.value == 8 else int(value.value & 0xFFFFFFFF)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
