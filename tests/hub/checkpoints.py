"""Tiny checkpoints as they lie on the hub: random weights under the names that the families' own checkpoints use."""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
}


def make_checkpoint(kind: str, folder: Path) -> Path:
    """A checkpoint of `kind` (a key of KINDS) in bfloat16, with a byte tokenizer, a template and some chaff."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    config = {**_COMMON, **KINDS[kind], "vocab_size": tokenizer.get_vocab_size()}
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": 2})
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE},
    )
    model_class, arguments_class = _get_classes(config=config)
    mx.random.seed(int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4]))
    model = model_class(arguments_class.from_dict(config))
    weights = tree_map(lambda a: (mx.random.normal(a.shape) * 0.1).astype(mx.bfloat16), model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), metadata={"format": "pt"})
    # What a text model does not need.
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    (folder / "README.md").write_text("A card.\n")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"another form")
    return folder


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
