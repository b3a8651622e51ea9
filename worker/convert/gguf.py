"""Convert a llama-architecture GGUF file to an ordinary MLX model folder.

Quantized tensors keep their exact values: MLX reads GGUF's Q4_0, Q4_1 and Q8_0 blocks as its own affine
weights (`weight` packed uint32, `scales` and `biases` float16, groups of 32), and every step here only
renames tensors or reorders whole rows of them.

The folder loads with `mlx_lm.load` and, for the tokenizer, with `transformers.AutoTokenizer`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a converted folder holds; all of them are needed to serve it."""

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF's name of the pre-tokenizer -> whether it splits off each digit before GPT-2's byte-level rule.
_SPLITS_DIGITS = {"smollm": True, "starcoder": True, "gpt-2": False}

# GGUF token types beside plain text: control tokens are hidden on decoding, user-defined ones are shown.
_CONTROL, _USER_DEFINED = 3, 4


class GgufError(Exception):
    """The file is not a GGUF model that can be converted; the message says which part is not."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Head counts of a llama model, which decide how the rows of q and k are ordered."""

    heads: int
    kv_heads: int


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` as an MLX model folder into the existing folder `out`.

    Raises GgufError if the file is not a GGUF, is no llama model, or uses a feature not handled here.
    """
    tensors, metadata = read_gguf(gguf)
    config = model_config(metadata, tensors)
    attention = Attention(config["num_attention_heads"], config["num_key_value_heads"])
    mx.save_safetensors(str(out / "model.safetensors"), to_mlx_weights(tensors, attention), {"format": "mlx"})
    build_tokenizer(metadata).save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokenizer_config(metadata))
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})


def read_gguf(gguf: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the tensors by their GGUF name, and the metadata as plain Python numbers, strings and lists."""
    try:
        # mlx's stub gives one type for every format; a GGUF with metadata is always these two.
        loaded: Any = mx.load(str(gguf), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise GgufError(f"{gguf} cannot be read as GGUF: {error}") from error
    tensors, metadata = loaded
    return tensors, {k: v.tolist() if isinstance(v, mx.array) else v for k, v in metadata.items()}


# --- weights


def to_mlx_weights(tensors: Mapping[str, mx.array], attention: Attention) -> dict[str, mx.array]:
    """Rename GGUF tensors to mlx-lm's names and put the rows of q and k into mlx-lm's rope order."""
    dtype = _activation_dtype(tensors)
    weights = {}
    for gguf_name, tensor in tensors.items():
        name = mlx_name(gguf_name)
        if ".q_proj." in name:
            tensor = unpermute_rope_rows(tensor, attention.heads)
        elif ".k_proj." in name:
            tensor = unpermute_rope_rows(tensor, attention.kv_heads)
        elif tensor.dtype == mx.float32:
            tensor = tensor.astype(dtype)
        weights[name] = tensor
    return weights


def mlx_name(gguf_name: str) -> str:
    """`blk.3.attn_q.scales` -> `model.layers.3.self_attn.q_proj.scales`; GgufError for one llama lacks."""
    stem, _, kind = gguf_name.rpartition(".")
    match stem.split("."):
        case ["blk", layer, tensor] if tensor in _LAYER_TENSOR_NAMES:
            return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[tensor]}.{kind}"
        case [tensor] if tensor in _TENSOR_NAMES:
            return f"{_TENSOR_NAMES[tensor]}.{kind}"
    raise GgufError(f"tensor {gguf_name!r} is not part of a plain llama model and has no place in the MLX one")


def unpermute_rope_rows(tensor: mx.array, heads: int) -> mx.array:
    """Reorder the rows of a q or k projection from GGUF's rope order to the half-split one.

    GGUF stores each head's rows so that rope rotates neighbours (2i, 2i + 1); mlx-lm's rotates
    (i, i + d/2).
    Rows are outputs, so weight, scales and biases [heads * d, ...] of a quantized
    matrix all move the same way.
    """
    rows, *rest = tensor.shape
    pairs = tensor.reshape(heads, rows // heads // 2, 2, *rest)  # [heads, d/2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows, *rest)


def _activation_dtype(tensors: Mapping[str, mx.array]) -> mx.Dtype:
    """The dtype that float32 norm weights are stored in: that of the scales or of the 16-bit matrices.

    One float32 norm would otherwise turn every activation, and with it the KV cache, into float32.
    """
    for name in ("token_embd.scales", "token_embd.weight"):
        if name in tensors:
            return tensors[name].dtype
    raise GgufError("the file has no token_embd tensor")


# --- config.json


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> dict[str, Any]:
    """The Hugging Face llama config, with mlx-lm's `quantization` entry where weights are packed."""
    architecture = _required(metadata, "general.architecture")
    if architecture != "llama":
        raise GgufError(f"architecture is {architecture!r}; only 'llama' can be converted")
    if any(key.startswith("llama.rope.scaling.") for key in metadata):
        raise GgufError("scaled rope (llama.rope.scaling.*) is not handled")

    hidden_size = _required(metadata, "llama.embedding_length")
    heads = _required(metadata, "llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": _required(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _required(metadata, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _required(metadata, "llama.context_length"),
        "rms_norm_eps": _shortest_float32(_required(metadata, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float32(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": str(_activation_dtype(tensors)).removeprefix("mlx.core."),
        "vocab_size": len(_required(metadata, "tokenizer.ggml.tokens")),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _required(metadata, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    widths = {"ffn_down": config["intermediate_size"], "attn_output": heads * config["head_dim"]}
    quantization = _quantization(tensors, hidden_size, widths)
    return config | ({"quantization": quantization} if quantization else {})


def _quantization(tensors: Mapping[str, mx.array], hidden_size: int, input_widths: Mapping[str, int]) -> dict[str, Any]:
    """mlx-lm's quantization entry: the usual form, and by module name each tensor that differs.

    The input width of a tensor is `hidden_size` unless `input_widths` names another for its kind.
    """
    forms: dict[str, tuple[int, int]] = {}
    for name in (n for n in tensors if n.endswith(".scales")):
        stem = name.removesuffix(".scales")
        width = input_widths.get(stem.rpartition(".")[2], hidden_size)
        group_size = width // tensors[name].shape[-1]
        bits = tensors[f"{stem}.weight"].shape[-1] * 32 // width
        forms[mlx_name(name).removesuffix(".scales")] = (group_size, bits)
    if not forms:
        return {}
    values = list(forms.values())
    usual = max(values, key=values.count)
    entry: dict[str, Any] = {"group_size": usual[0], "bits": usual[1], "mode": "affine"}
    for module, (group_size, bits) in sorted(forms.items()):
        if (group_size, bits) != usual:
            entry[module] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    return entry


# --- tokenizer


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of the metadata; it adds no token of its own around a text."""
    kind, pre = _required(metadata, "tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _SPLITS_DIGITS:
        known = ", ".join(_SPLITS_DIGITS)
        raise GgufError(f"tokenizer is {kind!r} with pre-tokenizer {pre!r}; only 'gpt2' with one of {known} is handled")
    tokens: list[str] = _required(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "tokenizer.ggml.merges")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if _SPLITS_DIGITS[pre]:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    types: Sequence[int] = _required(metadata, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(_added_tokens(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added_tokens(tokens, types, _USER_DEFINED))
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json. The generic class is named: transformers' GPT2 one would drop the digit rule."""
    tokens: list[str] = _required(metadata, "tokenizer.ggml.tokens")
    ids = {
        "bos_token": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token": _required(metadata, "tokenizer.ggml.eos_token_id"),
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _required(metadata, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    }
    config |= {name: tokens[i] for name, i in ids.items() if i is not None}
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config


def _added_tokens(tokens: Sequence[str], types: Sequence[int], wanted: int) -> list[AddedToken]:
    is_control = wanted == _CONTROL
    pairs = zip(tokens, types, strict=True)
    return [AddedToken(t, special=is_control, normalized=False) for t, kind in pairs if kind == wanted]


# --- small helpers


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise GgufError(f"metadata key {key!r} is missing")
    return metadata[key]


def _shortest_float32(value: float) -> float:
    """9.999999747378752e-06, which is float32's 1e-5 widened to a double, back to 1e-05."""
    return float(f"{value:.7g}")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
