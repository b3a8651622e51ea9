"""A model folder so small that a worker has it in a second: for tests of processes, not of texts."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from tests.worker.tiny import randomized

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, tokenizer_of: Path, seed: int) -> None:
    """A random model of a few megabytes with the demo model's vocabulary."""
    folder.mkdir(parents=True)
    for file in tokenizer_of.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            shutil.copy(file, folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    model = randomized(llama.Model(llama.ModelArgs.from_dict(CONFIG)), seed)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(CONFIG))
