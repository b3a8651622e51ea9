"""OpenBLAS for CPU workers on Linux: MLX's CPU wheel links a reference BLAS that is some 50 times slower.

The PyPI package `cmeel-openblas` ships the library; preloading it into a worker replaces the reference one. Its x86
builds have kernels for one kind of processor (0.3.29: AVX2, 0.3.31: AVX-512) and die of SIGILL on others; there the
system's OpenBLAS, which chooses its kernels as it is loaded, does the work.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from common import paths

CPU_INFO = Path("/proc/cpuinfo")
AVX2 = frozenset({"avx2", "fma"})
AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
SYSTEM_FOLDERS = (
    Path("/usr/lib/x86_64-linux-gnu"),
    Path("/usr/lib/aarch64-linux-gnu"),
    Path("/usr/lib64"),
    Path("/usr/lib"),
)
SYSTEM_NAMES = ("libopenblas.so.0", "libopenblasp.so.0")


@cache
def library() -> Path | None:
    """The OpenBLAS that this processor can run, or None where there is none or none is needed (macOS, CUDA)."""
    if sys.platform != "linux" or not _has_distribution("mlx-cpu"):
        return None
    packaged = _packaged()
    if packaged.exists() and runs_here(packaged):
        return packaged
    candidates = (folder / name for folder in SYSTEM_FOLDERS for name in SYSTEM_NAMES)
    return next((path for path in candidates if path.exists()), None)


def advice() -> str:
    """How to get one, for somebody who has none."""
    if _packaged().exists():
        return "the packaged OpenBLAS is made for another processor, install the system's: apt-get install libopenblas0"
    return "install cmeel-openblas"


def runs_here(library: Path) -> bool:
    """Whether this processor has the instructions that a library was built with."""
    if platform.machine() != "x86_64":
        return True
    try:
        return needed(library.read_bytes()) <= flags(CPU_INFO.read_text())
    except OSError:
        return False


def needed(library: bytes) -> frozenset[str]:
    """What a build of OpenBLAS for x86 needs, by the configuration that it carries as a string."""
    built = re.search(rb"OpenBLAS [0-9.]+([A-Za-z_0-9 ]*)", library)
    names = built.group(1).split() if built else []
    if b"DYNAMIC_ARCH" in names:
        return frozenset()
    return AVX512 if {b"SKYLAKEX", b"COOPERLAKE", b"SAPPHIRERAPIDS"} & set(names) else AVX2


def flags(cpu_info: str) -> frozenset[str]:
    """The instruction sets that /proc/cpuinfo lists."""
    line = next((line for line in cpu_info.splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())


def with_preload(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A copy of `env` for a worker process, with OpenBLAS preloaded where there is one.

    `MLXSPEC_BLAS=reference` keeps the wheel's own: slow, but bitwise independent of batch and width.
    """
    changed = dict(env)
    path = library()
    if path is None or env.get("MLXSPEC_BLAS") == "reference" or str(path) in env.get("LD_PRELOAD", ""):
        return changed
    changed["LD_PRELOAD"] = ":".join(filter(None, [str(path), env.get("LD_PRELOAD", "")]))
    fortran = _fortran_folders()
    if fortran:
        changed["LD_LIBRARY_PATH"] = ":".join([*map(str, fortran), *filter(None, [env.get("LD_LIBRARY_PATH", "")])])
    return changed


def _fortran_folders() -> list[Path]:
    """Folders with the Fortran runtime that OpenBLAS needs, empty where the system has one.

    MLX's CPU wheel carries it under a mangled name; a link with the usual name makes it loadable.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgfortran.so.5")
        return []
    bundled = sorted((_site_packages() / "mlx_cpu.libs").glob("libgfortran-*.so.5*"))
    if not bundled:
        return []
    folder = paths.home() / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libgfortran.so.5"
    if not link.exists() or link.resolve() != bundled[0].resolve():
        fresh = folder / f".libgfortran.{os.getpid()}"
        fresh.symlink_to(bundled[0])
        fresh.replace(link)
    return [folder, bundled[0].parent]


def _packaged() -> Path:
    return _site_packages() / "cmeel.prefix" / "lib" / "libopenblas.so"


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _has_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
