"""Checks of the machine and of what is installed on it: what was found and, if that is not well, what to do."""

import enum
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from common import config as configuration
from common import openblas, paths, sockets
from common.config import Config
from common.mlx_facts import MachineFacts, ask_worker
from router.service.definition import MAX_OPEN_FILES
from router.units import in_binary_units, in_units

LEAST_DISK_BYTES = 5 << 30
LEAST_MEMORY_BYTES = 4 << 30
GIB = 1 << 30


class Level(enum.StrEnum):
    """How a check went: `WARN` slows or limits the server, `FAIL` keeps it from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""


def check_mlx(facts: MachineFacts | str) -> Iterator[Check]:
    """Backend, BLAS and fusion, of the facts or of why there are none."""
    if isinstance(facts, str):
        yield Check("mlx", Level.FAIL, facts, "install it anew: scripts/setup, or pip install 'mlxspec[cpu]' on Linux")
        return
    versions = f"{facts.description}; mlx {facts.mlx}, mlx-lm {facts.mlx_lm}"
    if facts.computes:
        yield Check("mlx", Level.OK, versions)
    else:
        yield Check("mlx", Level.FAIL, f"{versions}: a product of two matrices is wrong", "install mlx anew")
    if facts.backend != "cpu":
        return
    if sys.platform == "darwin":
        yield Check(
            "gpu", Level.WARN, "MLX computes on the CPU", "a Mac with Apple silicon and a native Python use Metal"
        )
    elif "reference" in facts.description:
        yield Check("blas", Level.WARN, "reference BLAS, about 50 times slower", "pip install cmeel-openblas")
    else:
        yield Check("blas", Level.OK, "OpenBLAS")
    if facts.can_fuse:
        yield Check("compiler", Level.OK, shutil.which("g++") or "found")
    else:
        yield Check(
            "compiler", Level.WARN, "no g++: MLX cannot fuse operations on the CPU", "install g++ (apt install g++)"
        )


def examine_mlx(ask: Callable[[Mapping[str, str]], MachineFacts | str] = ask_worker) -> list[Check]:
    """MLX as workers use it. Where that fails because of OpenBLAS alone, this is said."""
    facts = ask(os.environ)
    if isinstance(facts, MachineFacts) or openblas.library() is None:
        return list(check_mlx(facts))
    plain = ask({**os.environ, "MLXSPEC_BLAS": "reference"})
    if isinstance(plain, str):
        return list(check_mlx(facts))
    advice = "set MLXSPEC_BLAS=reference, which is slow, or install a build of cmeel-openblas for this CPU"
    return [Check("blas", Level.FAIL, f"{facts} (with OpenBLAS; without it MLX works)", advice)]


def check_memory(budget_bytes: int, total_bytes: int) -> Check:
    """Whether the models' budget leaves room for the system."""
    found = f"{in_binary_units(budget_bytes)} for models, of {in_binary_units(total_bytes)}"
    if budget_bytes > 0.9 * total_bytes:
        return Check("memory", Level.WARN, found, "leave the system a tenth: lower supervisor.memory_limit_gb")
    if budget_bytes < LEAST_MEMORY_BYTES:
        return Check("memory", Level.WARN, found, "only small models fit: raise supervisor.memory_limit_gb")
    return Check("memory", Level.OK, found)


def check_files(soft: int, hard: int) -> Check:
    """Whether there are files enough for connections and workers. The router raises its soft limit by itself."""
    found = f"{_limit(soft)} open files, at most {_limit(hard)}"
    if hard != resource.RLIM_INFINITY and hard < MAX_OPEN_FILES:
        return Check("files", Level.WARN, found, f"raise the hard limit to {MAX_OPEN_FILES} (ulimit -Hn)")
    return Check("files", Level.OK, found)


def check_home(home: Path) -> Check:
    """Whether we may write there, others may not, and sockets below it have names that are short enough."""
    longest = len(os.fsencode(home / "run" / sockets.CONTROL_SOCKET))
    if longest > sockets.MAX_IPC_PATH_BYTES:
        found = f"{home}: socket paths in it have {longest} bytes, and at most {sockets.MAX_IPC_PATH_BYTES} work"
        return Check("home", Level.FAIL, found, "set MLXSPEC_HOME to a shorter folder")
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check("home", Level.FAIL, f"{home} cannot be written", "set MLXSPEC_HOME to a folder of yours")
    return Check("home", Level.OK, str(home) if home.exists() else f"{home} (made at the first start)")


def check_disk(home: Path) -> Check:
    """Room for models."""
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{in_units(free)} free at {place}"
    if free < LEAST_DISK_BYTES:
        return Check("disk", Level.WARN, found, "make room: a model takes from 1 to 100 GB")
    return Check("disk", Level.OK, found)


def check_port(host: str, port: int, owner: int | None) -> Check:
    """Whether we could listen there, or do (`owner` is the pid of our running server)."""
    if owner is not None:
        return Check("port", Level.OK, f"{host}:{port}; our server runs (pid {owner})")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = "choose another with --port or server.port, or end the program that has it"
            return Check("port", Level.FAIL, f"{host}:{port}: {error.strerror}", advice)
    return Check("port", Level.OK, f"{host}:{port} is free")


def check_models(config: Config) -> Check:
    """Whether there is something to serve."""
    found = configuration.discover_models(config)
    if not found:
        advice = f"put one into {paths.models_dir()}, or start with --model-path FOLDER_OR_HUGGING_FACE_ID"
        return Check("models", Level.WARN, "none", advice)
    return Check("models", Level.OK, ", ".join(sorted(found)))


def check_service(status: Mapping[str, bool], path: str) -> Check:
    """Whether the installed service, if there is one, runs."""
    if not status["is_installed"]:
        return Check("service", Level.OK, "not installed (mlxspec service install)")
    if not status["is_running"]:
        return Check("service", Level.WARN, f"{path} is installed and does not run", "mlxspec service install, or logs")
    return Check("service", Level.OK, f"{path} runs")


def running_server(run_dir: Path) -> int | None:
    """The pid of the server on this state folder, or None."""
    try:
        pid = int((run_dir / sockets.LOCK_FILE).read_text() or "0")
    except (OSError, ValueError):
        return None
    is_there = pid > 0 and psutil.pid_exists(pid) and (run_dir / "config.json").is_file()
    return pid if is_there else None


def _limit(count: int) -> str:
    return "unlimited" if count == resource.RLIM_INFINITY else str(count)
