"""How much memory there is, and how much a model will need before any of its weights are read.

The estimate comes from the headers of its safetensors files and its config.json; once the worker runs, what
it reports counts instead.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from common.config import SupervisorConfig
from common.footprint import (
    ADMITTED_TOKENS,
    GIB,
    ITEM_BYTES,
    PROCESS_BYTES,
    RAM_SHARE,
    integer,
    kv_bytes_per_token,
    read_header,
    served_form,
)
from common.messages import Heartbeat, ModelFacts
from common.mlx_facts import cuda_bytes
from router.supervisor import pressure

METAL_SHARE_SMALL, METAL_SHARE = 2 / 3, 3 / 4  # what macOS recommends to wire at most, up to 36 GB and above
SMALL_MAC_BYTES = 36 * GIB
GPU_RESERVE_BYTES = GIB  # for the system's own use of the GPU
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_FLOATS = ("F64", "F32", "F16", "BF16")

Header = Mapping[str, Any]


def budget(config: SupervisorConfig) -> int:
    """Bytes that all workers together may use: as configured, else what the machine, or its GPU, can spare."""
    if config.memory_limit_gb > 0:
        return int(config.memory_limit_gb * GIB)
    total = psutil.virtual_memory().total
    if sys.platform == "darwin":
        return metal_budget(total, pressure.read_sysctl("iogpu.wired_limit_mb"))
    if gpu_bytes := cuda_bytes():
        return less_reserve(gpu_bytes)
    return ram_budget(total, _read_text(CONTAINER_LIMIT))


def metal_budget(total_bytes: int, wired_limit_mb: int) -> int:
    """Metal's recommended working set, or the limit that the machine's owner has set, less a reserve."""
    share = METAL_SHARE_SMALL if total_bytes <= SMALL_MAC_BYTES else METAL_SHARE
    working_set = wired_limit_mb * 2**20 or int(share * total_bytes)
    return less_reserve(working_set)


def less_reserve(gpu_bytes: int) -> int:
    """What models may have of a GPU's memory."""
    return max(gpu_bytes - GPU_RESERVE_BYTES, gpu_bytes // 2)


def ram_budget(total_bytes: int, container_limit: str = "") -> int:
    """Three quarters of the memory, or of what our container may use of it (a number of bytes, or "max")."""
    limit = int(container_limit) if container_limit.strip().isdigit() else total_bytes
    return int(RAM_SHARE * min(total_bytes, limit))


def kv_need(facts: ModelFacts) -> int:
    """Bytes of keys, values and states that a freshly loaded model is expected to fill."""
    return ADMITTED_TOKENS * facts.kv_bytes_per_token + facts.kv_bytes_per_row


def charge(heartbeat: Heartbeat) -> int:
    """What a running worker holds: MLX's own counters miss some of it, the process's footprint others."""
    return max(heartbeat.active_bytes + heartbeat.cache_bytes, heartbeat.footprint_bytes)


def base(heartbeat: Heartbeat) -> int:
    """What of it is neither keys, values nor buffers kept for later: the weights and the process."""
    return max(0, charge(heartbeat) - heartbeat.kv_bytes - heartbeat.cache_bytes)


def estimate_need(path: str, weights: str, draft_path: str = "") -> int | None:
    """Bytes that the model at `path` will hold in the `weights` form; None when nothing is known of it.

    A smaller model that drafts for it, at `draft_path`, is loaded beside it.
    """
    folder = local_folder(path)
    if folder is None:
        return None
    config = _read_json(folder / "config.json")
    size = _weights_bytes(folder, config, served_form(weights))
    drafter = local_folder(draft_path) if draft_path else None
    if drafter is not None:
        size += _weights_bytes(drafter, _read_json(drafter / "config.json"), served_form(weights))
    return size + ADMITTED_TOKENS * kv_bytes_per_token(config, served_form(weights)) + PROCESS_BYTES


def local_folder(path: str) -> Path | None:
    """The folder of a model: `path` itself, or its place in the Hugging Face cache; None if there is none."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or path.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

    try:
        found = try_to_load_from_cache(path, "config.json")
    except ValueError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def fingerprint(path: str) -> tuple[tuple[str, int, int], ...] | None:
    """Name, size and time of each file of a model: other than before means that loading it may now work."""
    folder = local_folder(path)
    if folder is None:
        return None
    try:
        files = [(f.name, f.stat()) for f in folder.iterdir() if f.is_file()]
    except OSError:
        return None
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _weights_bytes(folder: Path, config: Header, form: str) -> int:
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_header(file)
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    return sum(_served_sizes(tensors, quantization, form))


def _served_sizes(tensors: Header, quantization: Header, form: str) -> Iterator[int]:
    """Bytes of each tensor as it is served. A packed weight counts by its scales: one a group of elements."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        items = math.prod(tensor["shape"])
        is_packed = f"{module}.scales" in tensors
        if form == "stored" or not is_packed:
            keeps_type = form == "stored" or tensor["dtype"] not in _FLOATS
            yield items * (_DTYPE_BYTES.get(tensor["dtype"], 1) if keeps_type else ITEM_BYTES[form])
        elif part == "scales":
            yield items * _group_size(quantization, module) * ITEM_BYTES[form]


def _group_size(quantization: Header, module: str) -> int:
    own = quantization.get(module)
    size = integer(own, "group_size") if isinstance(own, dict) else 0
    return size or integer(quantization, "group_size") or 64


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
