"""A tiny model that has learned a made-up language in a few seconds, so that a head has something to learn from it.

`python -m tests.worker.training.language FOLDER` writes it down as a model's folder.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from worker.training.dialogue import Dialogue

VOCABULARY = 64
END = 0
DIALOGUE = Dialogue((1,), (), (0, 1), (), frozenset({END}), frozenset({END, 1}))
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
}


def untrained() -> Any:
    """The model before it has learned anything."""
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs(**CONFIG))
    mx.eval(model.parameters())
    return model


def sentences(random: np.random.Generator, rows: int, length: int) -> np.ndarray[Any, Any]:
    """Each token is one of three that may follow the two before it; the first of them in most places."""
    after = np.random.default_rng(3).integers(2, VOCABULARY, (VOCABULARY, VOCABULARY, 3))
    text = np.ones((rows, length), dtype=np.int32)
    text[:, 1] = random.integers(2, VOCABULARY, rows)
    for place in range(2, length):
        choice = random.choice(3, rows, p=(0.8, 0.15, 0.05))
        text[:, place] = after[text[:, place - 2] % 4, text[:, place - 1], choice]
    return text


@cache
def trained(steps: int = 250) -> Any:
    """The model that knows the language; shared, not to be changed."""
    model, random = untrained(), np.random.default_rng(0)
    optimizer = optim.Adam(learning_rate=3e-3)

    def loss(model: Any, text: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(steps):
        _, gradients = step(model, mx.array(sentences(random, 16, 33)))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    model.update(tree_map(lambda array: array * 1.0, model.parameters()))
    model.freeze()
    return model


def write(to: Path) -> None:
    """The model that knows the language as a folder; its words are w0, w1 and so on."""
    to.mkdir(parents=True)
    mx.save_safetensors(str(to / "model.safetensors"), dict(tree_flatten(trained().parameters())))
    (to / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 512}))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(to / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w0", "unk_token": "w1"}
    (to / "tokenizer_config.json").write_text(json.dumps(kind))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
