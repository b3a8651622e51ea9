"""Bring a checkpoint into MLX form: `python -m worker.convert.mlx SOURCE OUT [--form q4] [--group-size 64]`.

SOURCE is a folder with a config.json and model*.safetensors of any architecture that mlx-lm knows. OUT appears in one
rename. Exit code 0, or 1 with a last line `error: CODE: reason` on standard error.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import dequantize_model, load, quantize_model, save

from common import lifeline
from common.errors import Conflict, InvalidValue, MlxspecError
from common.forms import FLOATS, FORMS, GROUP_SIZES, MXFP4_GROUP_SIZE, QUANTIZED_BITS
from worker.loader import BadModel, check_safe

GROUP_SIZE = 64


def convert(source: Path, out: Path, form: str | None, group_size: int | None = None) -> None:
    """Write the model at `source` to `out`; `form` is one of `FORMS`, or None for the stored numbers.

    Raises `Conflict` when `out` is there, `BadModel` when the model cannot be read, `InvalidValue` when its shapes do
    not take the form.
    """
    if out.exists():
        raise Conflict(f"{out} exists already; remove it first")
    check_safe(source)
    model, tokenizer, config = _read(source)
    if form in FLOATS:
        model, config = _as_floats(model, config, getattr(mx, FLOATS[form]))
    elif form is not None:
        model, config = _quantized(model, config, form, group_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = made_for(out)
    _sweep(out)
    try:
        save(made, source, model, tokenizer, config)
        for extra in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
            if (source / extra).is_file():
                shutil.copy(source / extra, made)
        for name in ("README.md", *(path.name for path in made.glob("*.py"))):
            (made / name).unlink(missing_ok=True)  # a card for uploading, and code, which is never run
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def made_for(out: Path) -> Path:
    """The hidden folder in which this process makes `out`."""
    return out.parent / f".{out.name}-{os.getpid()}"


def _sweep(out: Path) -> None:
    """Take away what conversions that were killed have left."""
    for folder in out.parent.glob(f".{out.name}-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _read(source: Path) -> tuple[Any, Any, dict[str, Any]]:
    try:
        # As one tuple of three where the configuration is asked for.
        model, tokenizer, config = load(str(source), return_config=True, lazy=True)  # type: ignore[misc]
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise BadModel(f"cannot load {source}: {str(error).splitlines()[0] if str(error) else type(error)}") from error
    return model, tokenizer, config


def _quantized(model: Any, config: dict[str, Any], form: str, group_size: int | None) -> tuple[Any, dict[str, Any]]:
    """Packed weights. A model that is quantized already is unfolded first."""
    if "quantization" in config:
        model, config = _as_floats(model, config, None)
    is_float4 = form == "mxfp4"
    size = group_size or (MXFP4_GROUP_SIZE if is_float4 else GROUP_SIZE)
    try:
        quantized, changed = quantize_model(
            model, config, size, QUANTIZED_BITS[form], mode="mxfp4" if is_float4 else "affine"
        )
    except ValueError as error:
        raise InvalidValue(f"this model cannot be {form} with groups of {size}: {error}") from error
    if not any(name.endswith(".scales") for name, _ in tree_flatten(quantized.parameters())):
        raise InvalidValue(
            f"groups of {size} divide the width of none of this model's layers; try a smaller group size"
        )
    return quantized, changed


def _as_floats(model: Any, config: dict[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Plain floats of one type (None: each as it is, when a quantized model is unfolded)."""
    if "quantization" in config:
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if dtype is not None:
        keeps = getattr(model, "cast_predicate", lambda _: True)

        def cast(name: str, array: Any) -> Any:
            return array.astype(dtype) if keeps(name) and mx.issubdtype(array.dtype, mx.floating) else array

        model.update(tree_map_with_path(cast, model.parameters()))
        config = {**config, "torch_dtype": str(dtype).removeprefix("mlx.core.")}
    return model, config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m worker.convert.mlx", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--form", choices=FORMS, help="how to store the weights (default: as they are)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="weights that share a scale (default 64)")
    options = parser.parse_args(arguments)

    def leave() -> None:
        shutil.rmtree(made_for(options.out), ignore_errors=True)
        os._exit(1)

    lifeline.watch(leave)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints as it goes
            convert(options.source, options.out, options.form, options.group_size)
    except MlxspecError as error:
        print(f"error: {error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
