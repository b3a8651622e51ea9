"""Whether a model can run on this machine: its architecture, its memory, and who would draft for it."""

import ast
import importlib.util
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psutil

from common import paths
from common.footprint import (
    ADMITTED_TOKENS,
    GIB,
    ITEM_BYTES,
    PROCESS_BYTES,
    RAM_SHARE,
    kv_bytes_per_token,
    read_header,
    served_form,
)

COPYING = ("suffix", "ngram")  # they copy from the text, so every model has them
PACKED_DTYPES = {"U32": 32, "I32": 32}
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U32": 4, "I32": 4, "I64": 8, "U8": 1, "I8": 1}


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict for this machine. `needed_bytes` has the KV cache of 8192 tokens in it."""

    can_run: bool
    reason: str
    needed_bytes: int | None
    budget_bytes: int
    kv_bytes_per_token: int


class Drafters(msgspec.Struct, frozen=True, kw_only=True):
    """Who can draft for a model. `trained` are heads on this machine that were made for it."""

    copying: list[str]
    own_layers: bool
    trained: list[str]


def judge(config: Mapping[str, Any], weights_bytes: int | None, memory_limit_gb: float = 0.0) -> Fit:
    """Whether a model with this config.json, and so many bytes of weights as they are served here, can run."""
    budget = int(memory_limit_gb * GIB or RAM_SHARE * psutil.virtual_memory().total)
    per_token = kv_bytes_per_token(config, served_form("auto"))
    need = None if weights_bytes is None else weights_bytes + ADMITTED_TOKENS * per_token + PROCESS_BYTES
    reason = _refusal(config, need, budget)
    return Fit(can_run=not reason, reason=reason, needed_bytes=need, budget_bytes=budget, kv_bytes_per_token=per_token)


def _refusal(config: Mapping[str, Any], need: int | None, budget: int) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return "its config.json names no model_type"
    if config.get("model_file") or (config.get("auto_map") and kind not in supported_types()):
        return "it wants to run its own code, which is not allowed"
    if supported_types() and kind not in supported_types():
        return f"mlx-lm has no model type {kind!r}"
    if need is None:
        return "it has no model*.safetensors"
    if need > budget:
        return f"it needs {need / GIB:.1f} GiB and {budget / GIB:.1f} GiB may be used (supervisor.memory_limit_gb)"
    return ""


def served_bytes(parameters: Mapping[str, int], config: Mapping[str, Any], file_bytes: int) -> int:
    """Bytes of the weights as they are served here: the files', or unfolded to float32 on a CPU.

    `parameters` counts elements by type, as the hub does; a packed element holds several.
    """
    form = served_form("auto")
    if form == "stored" or not parameters:
        return file_bytes
    return element_count(parameters, config) * ITEM_BYTES[form]


def element_count(parameters: Mapping[str, int], config: Mapping[str, Any]) -> int:
    """Weights of a model, packed ones unpacked."""
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if not isinstance(bits, int) or bits <= 0:
        return sum(parameters.values())
    packed = sum(count * PACKED_DTYPES[dtype] // bits for dtype, count in parameters.items() if dtype in PACKED_DTYPES)
    return packed or sum(parameters.values())


def stored_bytes(parameters: Mapping[str, int]) -> int:
    """Bytes of the weights in their files."""
    return sum(count * DTYPE_BYTES.get(dtype, 2) for dtype, count in parameters.items())


def safetensors_elements(folder: Path) -> dict[str, int]:
    """Elements by type of a folder's weights, from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for tensor in read_header(path).values():
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
    return counts


@cache
def supported_types() -> frozenset[str]:
    """The `model_type`s that the installed mlx-lm has files for, read without importing it; empty if there is none."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    folder = Path(next(iter(spec.submodule_search_locations)))
    own = {path.stem for path in (folder / "models").glob("*.py") if not path.stem.startswith("_")}
    return frozenset(own | set(_renamed(folder / "utils.py")))


def _renamed(source: Path) -> dict[str, str]:
    """mlx-lm's table of model types that another type's file serves."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "MODEL_REMAPPING" for t in node.targets):
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    return {}


def drafters_of(name: str, config: Mapping[str, Any], drafts: Path | None = None) -> Drafters:
    """Who could draft for the model `name`."""
    layers = (config.get("text_config") or config).get("num_hidden_layers", 0)
    return Drafters(
        copying=list(COPYING),
        own_layers=isinstance(layers, int) and layers >= 4,
        trained=trained_heads(name, drafts),
    )


def trained_heads(name: str, drafts: Path | None = None) -> list[str]:
    """Heads that draft for `name`, made here (in `drafts`) or shipped: by their reports, or by their folders' names."""
    return sorted(head for head, model in _used_heads(drafts).items() if model in (name, name.rpartition("/")[2]))


def drafted_models(drafts: Path | None = None) -> list[str]:
    """Names of the models that have a head."""
    return sorted(set(_used_heads(drafts).values()))


def _used_heads(drafts: Path | None) -> dict[str, str]:
    """Heads that are used, each with the model that it was made for."""
    heads: dict[str, str] = {}
    for folder in (paths.shipped_drafts_dir(), drafts or paths.drafts_dir()):
        for path in folder.glob("*/config.json"):
            report = _report(path.with_name("report.json"))
            if report.get("is_used") is not False:
                heads[path.parent.name] = str(report.get("model", path.parent.name))
    return heads


def _report(path: Path) -> Mapping[str, Any]:
    """The head's report, empty where it has none that can be read."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}
