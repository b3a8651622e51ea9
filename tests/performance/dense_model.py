"""Writes the float32 weights that a CPU worker computes with as a model folder, for servers that convert nothing.

python -m tests.performance.dense_model SOURCE TARGET
"""

import os
import shutil
import sys
from pathlib import Path

from mlx_lm.utils import save_config, save_model

from worker import backend, loader


def build(source: Path, target: Path, weights: str = "float32") -> None:
    """Bit for bit the weights of the worker: both servers then compute the same model."""
    backend.prepare()
    loaded = loader.load(str(source), weights)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
        save_model(partial, loaded.model)
        config = {key: value for key, value in loaded.config.items() if not key.startswith("quantization")}
        save_config(config | {"torch_dtype": weights}, partial / "config.json")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
