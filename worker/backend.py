"""Which device and which BLAS this process computes with, and what that asks of MLX."""

import ctypes
import os
import shutil
from functools import cache

import mlx.core as mx

from common import openblas


def name() -> str:
    """`metal`, `cuda` or `cpu`."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def memory_bytes() -> int:
    """The GPU's memory, or what Metal recommends to use of it; 0 without a GPU."""
    info = {} if name() == "cpu" else mx.device_info()
    return int(info.get("max_recommended_working_set_size", info.get("total_memory", 0)))


def prepare() -> None:
    """Set what MLX needs before the first array.

    A CPU without a C++ compiler cannot fuse operations. On CUDA, MLX would capture kernels into graphs, each of which
    takes milliseconds to make: steps of ever other sizes are faster without (see docs/measurements.md).
    """
    if name() == "cpu" and not can_fuse():
        mx.disable_compile()
    if name() == "cuda":
        os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")


@cache
def can_fuse() -> bool:
    """Whether `mx.compile` can fuse operations: on a CPU it needs a C++ compiler."""
    return name() != "cpu" or shutil.which("g++") is not None


def describe() -> str:
    """The backend in words, e.g. `cpu, OpenBLAS 0.3.31 with 2 threads`."""
    if name() != "cpu":
        info = mx.device_info()
        return f"{name()}, {info.get('device_name', info.get('architecture', 'unknown device'))}"
    blas = _openblas()
    if blas is None:
        return f"cpu, the wheel's reference BLAS (slow; {openblas.advice()})"
    config = blas.openblas_get_config
    config.restype = ctypes.c_char_p
    version = config().decode().split()[1]
    return f"cpu, OpenBLAS {version} with {blas.openblas_get_num_threads()} threads"


def has_openblas() -> bool:
    """Whether OpenBLAS was preloaded into this process."""
    return _openblas() is not None


def blas_threads() -> int:
    """Threads that OpenBLAS uses; 1 where it is not loaded."""
    blas = _openblas()
    return 1 if blas is None else int(blas.openblas_get_num_threads())


def set_blas_threads(threads: int) -> None:
    """Let OpenBLAS use so many threads; 0, or where it is not loaded: nothing changes."""
    blas = _openblas()
    if blas is not None and threads:
        blas.openblas_set_num_threads(threads)


@cache
def _openblas() -> ctypes.CDLL | None:
    """The OpenBLAS that was preloaded into this process."""
    path = openblas.library()
    if path is None or str(path) not in os.environ.get("LD_PRELOAD", ""):
        return None
    return ctypes.CDLL(str(path))
