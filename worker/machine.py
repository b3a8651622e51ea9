"""`python -m worker.machine`: what MLX says of this machine, as JSON, for `mlxspec doctor`."""

import importlib.metadata
import json
import sys
from typing import Any

import mlx.core as mx

from worker import backend


def facts() -> dict[str, Any]:
    """Backend and BLAS, whether operations can be fused, versions, and the GPU's memory if there is one."""
    total = (mx.ones((8, 8)) @ mx.ones((8, 8))).sum().item()  # a backend that is installed may still not compute
    return {
        "backend": backend.name(),
        "description": backend.describe(),
        "can_fuse": backend.can_fuse(),
        "computes": total == 512,
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
        "working_set_bytes": backend.memory_bytes(),
    }


if __name__ == "__main__":
    json.dump(facts(), sys.stdout)
