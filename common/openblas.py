"""OpenBLAS for CPU workers on Linux: MLX's CPU wheel links a reference BLAS that is some 50 times slower.

The PyPI package `cmeel-openblas` ships the library; preloading it into a worker replaces the reference one.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from common import paths


def library() -> Path | None:
    """The OpenBLAS library of this environment, or None where it is not installed or not needed (macOS, CUDA)."""
    if sys.platform != "linux" or not _has_distribution("mlx-cpu"):
        return None
    path = _site_packages() / "cmeel.prefix" / "lib" / "libopenblas.so"
    return path if path.exists() else None


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


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _has_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
