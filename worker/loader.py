"""A model folder or hub id becomes a model and a tokenizer in memory, in the number format that suits the device."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, load_config, load_model, load_tokenizer

from common.errors import ConfigError
from worker import backend

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class BadModel(ConfigError):
    """The model cannot be loaded, now or on a second try."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run. `config` is its config.json; `weights` the number format of its weights."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    weights: str
    weights_bytes: int
    context_tokens: int


def load(path: str, weights: str = "auto") -> Loaded:
    """Load a model folder or hub id. Raises `BadModel` with the reason when that can never work."""
    folder = _folder(path)
    check_safe(folder)
    try:
        model, config = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise BadModel(f"cannot load {folder}: {error}") from error
    form = _form(weights)
    if form != "stored":
        model = _converted(model, _FLOATS[form])
    mx.eval(model.parameters())
    arrays = [array for _, array in tree_flatten(model.parameters())]
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        config=config,
        weights=_describe(form, config, arrays),
        weights_bytes=sum(array.nbytes for array in arrays),
        context_tokens=_context_tokens(config),
    )


def _folder(path: str) -> Path:
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise BadModel(f"{path} is not a model folder: it has no config.json")
    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub library raises many kinds, all final for this start
        raise BadModel(f"{path} is no local folder and could not be fetched from the hub: {error}") from error


def check_safe(folder: Path) -> None:
    """Only safetensors, and no code from the model's folder."""
    try:
        config = load_config(folder)
    except (OSError, ValueError) as error:
        raise BadModel(f"cannot read {folder / 'config.json'}: {error}") from error
    if config.get("model_file"):
        raise BadModel(f"{folder} wants to run its own code ({config['model_file']}), which is not allowed")
    if not glob.glob(str(folder / "model*.safetensors")):
        raise BadModel(f"{folder} has no model*.safetensors; convert the model to MLX first")


def _form(weights: str) -> str:
    """`stored` or a float format. A CPU computes everything but float32 so slowly that auto means float32 there."""
    if weights == "auto":
        return "float32" if backend.name() == "cpu" else "stored"
    return weights


def _converted(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """All floats of the model as `dtype`: scales first, so that quantized weights unfold in it and not in float16."""
    model.update(tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    return dequantize_model(model)


def _describe(form: str, config: dict[str, Any], arrays: list[mx.array]) -> str:
    if form != "stored":
        return form
    quantization = config.get("quantization") or config.get("quantization_config")
    if isinstance(quantization, dict) and "bits" in quantization:
        return f"{quantization['bits']}-bit"
    kinds = {str(a.dtype).removeprefix("mlx.core.") for a in arrays}
    return ", ".join(sorted(kinds))


def _context_tokens(config: dict[str, Any]) -> int:
    """The longest context the model was made for; 4096 where it does not say."""
    text = config.get("text_config", {})
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        for source in (config, text):
            if isinstance(source.get(key), int) and source[key] > 0:
                return int(source[key])
    return 4096


def vocabulary_size(config: dict[str, Any], tokenizer: Any) -> int:
    """Rows of the embedding: ids beyond it cannot be looked up."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size) if size else len(tokenizer)


def end_tokens(tokenizer: Any, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end an answer, from the tokenizer and the generation configuration."""
    ids = set(getattr(tokenizer, "eos_token_ids", set()) or set())
    configured = config.get("eos_token_id")
    if isinstance(configured, int):
        ids.add(configured)
    elif isinstance(configured, list):
        ids.update(configured)
    return frozenset(ids)
