"""Which BLAS a CPU worker gets: never one whose instructions the processor lacks."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import openblas

WITH = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512_vnni\n"
WITHOUT = "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma\n"
SKYLAKE, ZEN, ANY = (
    b"\x7fELF\0OpenBLAS 0.3.31 NO_AFFINITY SKYLAKEX\0",
    b"\0OpenBLAS 0.3.29 NO_AFFINITY ZEN\0",
    b"\0OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH NO_AFFINITY Haswell\0",
)
PRODUCT = "import mlx.core as mx; a = mx.ones((64, 576)) @ mx.ones((576, 64)); assert a[0, 0].item() == 576"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An x86 Linux machine with the package, made of files below this folder; `cpuinfo` and `usr` may be filled."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(openblas, "_has_distribution", lambda name: True)
    monkeypatch.setattr(openblas, "_site_packages", lambda: tmp_path / "site")
    monkeypatch.setattr(openblas, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(openblas, "SYSTEM_FOLDERS", (tmp_path / "usr",))
    (tmp_path / "site/cmeel.prefix/lib").mkdir(parents=True)
    (tmp_path / "usr").mkdir()
    (tmp_path / "site/cmeel.prefix/lib/libopenblas.so").write_bytes(SKYLAKE)
    openblas.library.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    openblas.library.cache_clear()
    yield
    openblas.library.cache_clear()


@pytest.mark.parametrize(
    ("library", "cpu_info", "runs"),
    [
        (SKYLAKE, WITH, True),
        (SKYLAKE, WITHOUT, False),
        (ZEN, WITHOUT, True),
        (ZEN, "", False),
        (ANY, "", True),
    ],
)
def test_a_build_runs_on_processors_that_have_its_instructions(library: bytes, cpu_info: str, runs: bool) -> None:
    assert (openblas.needed(library) <= openblas.flags(cpu_info)) == runs


def test_packaged_library_is_used_where_it_runs(machine: Path) -> None:
    (machine / "cpuinfo").write_text(WITH)
    assert openblas.library() == machine / "site/cmeel.prefix/lib/libopenblas.so"


def test_processor_without_avx512_gets_the_systems(machine: Path) -> None:
    (machine / "cpuinfo").write_text(WITHOUT)
    assert openblas.library() is None
    assert "libopenblas0" in openblas.advice()
    (machine / "usr/libopenblas.so.0").touch()
    openblas.library.cache_clear()
    assert openblas.library() == machine / "usr/libopenblas.so.0"


def test_machine_without_the_package_is_told_of_it(machine: Path) -> None:
    (machine / "site/cmeel.prefix/lib/libopenblas.so").unlink()
    (machine / "cpuinfo").write_text(WITH)
    assert openblas.library() is None
    assert openblas.advice() == "install cmeel-openblas"


def test_product_of_matrices_survives_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-c", PRODUCT], env=openblas.with_preload(), timeout=60)
    assert done.returncode == 0
