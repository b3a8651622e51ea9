"""What MLX says of this machine, asked of a process with a worker's environment: only workers import MLX."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

import msgspec

from common import openblas

TIMEOUT_S = 90.0  # the first import of MLX after an installation is slow
_CUDA_WHEEL = re.compile(r"mlx[-_]cuda")


class MachineFacts(msgspec.Struct, frozen=True):
    """What `python -m worker.machine` says. `working_set_bytes`: the GPU's memory that MLX may use; 0 without one."""

    backend: str
    description: str
    can_fuse: bool
    computes: bool
    mlx: str
    mlx_lm: str
    working_set_bytes: int


def ask_worker(env: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S) -> MachineFacts | str:
    """MLX's facts; or why there are none."""
    command = [sys.executable, "-P", "-m", "worker.machine"]
    try:
        done = subprocess.run(
            command, env=openblas.with_preload(env), capture_output=True, timeout=timeout_s, check=False
        )
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=MachineFacts)
    except subprocess.TimeoutExpired:
        return f"MLX did not start within {timeout_s:g} s"
    except msgspec.DecodeError as error:
        return f"MLX said something odd: {error}"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"MLX cannot be used: {lines[-1] if lines else _exit_text(done.returncode)}"


@cache
def cuda_bytes() -> int:
    """The memory of the GPU that MLX's CUDA backend computes on; 0 where it is not installed or finds none."""
    if not any(_CUDA_WHEEL.match(found.name) for found in importlib.metadata.distributions()):
        return 0
    facts = ask_worker()
    return facts.working_set_bytes if isinstance(facts, MachineFacts) and facts.backend == "cuda" else 0


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
