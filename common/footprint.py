"""How much memory a model will take, as far as that follows from its config.json and this machine."""

import json
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RAM_SHARE = 0.75
GIB = 2**30
PROCESS_BYTES = 256 * 2**20  # interpreter, MLX, tokenizer
ADMITTED_TOKENS = 8192  # KV cache that a freshly loaded model is expected to fill
MAX_HEADER_BYTES = 100 * 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def served_form(weights: str) -> str:
    """What "auto" means on this machine: float32 where MLX computes on a Linux CPU, else the form on disk."""
    return ("float32" if computes_on_cpu() else "stored") if weights == "auto" else weights


def computes_on_cpu() -> bool:
    """Whether the installed MLX has no GPU backend."""
    return sys.platform == "linux" and _is_installed("mlx-cpu") and not _is_installed("mlx-cuda-13")


def kv_bytes_per_token(config: Mapping[str, Any], form: str) -> int:
    """Bytes of keys and values of one token in all layers; 0 when the config does not say."""
    text = config.get("text_config") or config
    layers, heads = integer(text, "num_hidden_layers"), integer(text, "num_attention_heads")
    kv_heads = integer(text, "num_key_value_heads") or heads
    head_size = integer(text, "head_dim") or (integer(text, "hidden_size") // heads if heads else 0)
    return 2 * layers * kv_heads * head_size * ITEM_BYTES.get(form, 2)


def read_header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name, each with `dtype` and `shape`; empty if it is unreadable."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                return {}
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        return {}
    return {name: t for name, t in header.items() if _is_tensor(t)} if isinstance(header, dict) else {}


def integer(values: Mapping[str, Any], key: str) -> int:
    """A whole number of somebody else's JSON; 0 when it is none."""
    value = values.get(key)
    return value if isinstance(value, int) else 0


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(n, int) and n >= 0 for n in entry["shape"])
    )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
