"""What a product with a layer's matrix costs, as the matrix is stored and as `worker/matrices.py` has it.

usage: python -m tests.performance.products [--bits 4] [--tokens 1,8,32,128]

On a CPU: stored by outputs and by inputs. On a GPU, quantized in `--bits`: MLX's kernel, the matrix unfolded first, and
16-bit weights. Microseconds a product, medians, of as many matrices as no cache holds, in one go.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from tests.performance.step_cost import numbers
from worker import backend, matrices

SHAPES = {  # inputs and outputs of SmolLM2-135M's layers
    "queries": (576, 576),
    "queries, keys, values": (576, 960),
    "gate": (576, 1536),
    "gate, up": (576, 3072),
    "down": (1536, 576),
    "vocabulary": (576, 49152),
}
BYTES = 60_000_000  # of all matrices of a shape
MOST_MATRICES = 30
REPEATS = 12
GROUP_SIZE = 64

Products = Callable[[], Sequence[mx.array]]


def main() -> int:
    options = parse()
    backend.prepare()
    print(backend.describe(), flush=True)
    for name, (inputs, outputs) in SHAPES.items():
        count = min(max(BYTES // (inputs * outputs * 4), 1), MOST_MATRICES)
        plain = [mx.random.normal((outputs, inputs)) * 0.05 for _ in range(count)]
        for tokens in options.tokens:
            x = mx.random.normal((tokens, 1, inputs))
            ways = on_cpu(x, plain) if backend.name() == "cpu" else on_gpu(x, plain, options.bits)
            figures = "  ".join(f"{way} {timed(make) / count:7.1f}" for way, make in ways.items())
            print(f"{name:22} {tokens:4} tokens  {figures}", flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 8, 16, 32, 64, 128])
    return parser.parse_args()


def on_cpu(x: mx.array, plain: Sequence[mx.array]) -> dict[str, Products]:
    ordered = [matrices.ordered(matrix) for matrix in plain]
    mx.eval(x, plain)
    return {
        "by outputs": lambda: [x @ matrix.T for matrix in plain],
        "by inputs": lambda: [x @ matrix.T for matrix in ordered],
    }


def on_gpu(x: mx.array, plain: Sequence[mx.array], bits: int) -> dict[str, Products]:
    halves = [matrix.astype(mx.bfloat16) for matrix in plain]
    own = [mx.quantize(matrix, group_size=GROUP_SIZE, bits=bits) for matrix in halves]
    x = x.astype(mx.bfloat16)
    mx.eval(x, halves, own)
    return {
        "kernel": lambda: [
            mx.quantized_matmul(x, *parts, transpose=True, group_size=GROUP_SIZE, bits=bits) for parts in own
        ],
        "unfolded": lambda: [x @ mx.dequantize(*parts, group_size=GROUP_SIZE, bits=bits).T for parts in own],
        "16 bits": lambda: [x @ matrix.T for matrix in halves],
    }


def timed(make: Products) -> float:
    """Median microseconds of all products."""
    times = []
    for _ in range(REPEATS + 3):
        began = time.perf_counter()
        mx.eval(make())
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e6


if __name__ == "__main__":
    sys.exit(main())
