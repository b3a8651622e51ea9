"""What a step costs by its rows and width, beside a step of one row and width 1: V(rows × width) of this device.

usage: python -m tests.performance.step_cost MODEL_FOLDER|8b [--weights stored] [--context 200] [--rows 1,8,32]

`8b` is a model of Llama 3's size with random weights (bfloat16): for the arithmetic it does not matter what they are.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import llama

from worker import backend, loader
from worker.cache.layout import Segment
from worker.target import Target

REPEATS = 9
CHUNK = 32


def main() -> int:
    options = parse()
    backend.prepare()
    target = Target(random_8b() if options.model == "8b" else loader.load(options.model, options.weights).model)
    print(backend.describe(), options.model, options.weights, f"context {options.context}", flush=True)
    figures: list[dict[str, Any]] = []
    for rows in options.rows:
        fill(target, rows, options.context)
        for width in options.widths:
            if rows * width > options.most_tokens:
                continue
            figures.append(timed(target, rows, width, options.context))
            base = figures[0]["total_ms"]
            line = " ".join(f"{name} {value:.2f}" for name, value in figures[-1].items())
            print(f"{line} V {figures[-1]['total_ms'] / base:.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"backend": backend.describe(), "figures": figures}) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rows", type=numbers, default=[1, 4, 8, 32])
    parser.add_argument("--widths", type=numbers, default=[1, 2, 3, 4, 6, 9])
    parser.add_argument("--most-tokens", type=int, default=300)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def random_8b() -> llama.Model:
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=32,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            vocab_size=128256,
            tie_word_embeddings=False,
        )
    )
    model.update(tree_map(lambda a: (mx.random.normal(a.shape) * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def fill(target: Target, rows: int, context: int) -> None:
    """Let each row hold `context` tokens."""
    target.clear()
    target.state.longest_tokens = context + 64
    for start in range(0, context, CHUNK):
        width = min(CHUNK, context - start)
        run(target, [Segment(row, start, width, True) for row in range(rows)], [0])
        for row in range(rows):
            target.state.commit(row, start + width)


def timed(target: Target, rows: int, width: int, context: int) -> dict[str, Any]:
    """Median milliseconds of such a step: of building its graph on the host, and until its tokens are there."""
    segments = [Segment(row, context, width) for row in range(rows)]
    times = []
    for _ in range(REPEATS + 3):
        times.append(run(target, segments, range(rows * width)))
        for row in range(rows):
            target.state.commit(row, context)
    build, total = (statistics.median(time[i] for time in times[3:]) * 1e3 for i in range(2))
    return {"rows": rows, "width": width, "build_ms": build, "total_ms": total}


def run(target: Target, segments: list[Segment], chosen: Any) -> tuple[float, float]:
    began = time.perf_counter()
    tokens = [1] * sum(segment.width for segment in segments)
    own = mx.argmax(target.forward(segments, tokens, chosen), axis=-1)
    built = time.perf_counter()
    mx.eval(own, target.cached_arrays())
    own.tolist()
    return built - began, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
