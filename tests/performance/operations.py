"""What an operation of a model's step costs the host on a GPU: microseconds each, of many in one compiled function.

usage: python -m tests.performance.operations [--tokens 32]

The shapes are those of SmolLM2-135M. `encode` is until `mx.async_eval` returns, `all` until the result is there: where
the two are the same the device waits for the host.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

from worker import backend

COUNT = 200
REPEATS = 9
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 576, 9, 3, 64, 1536

Operation = Callable[[mx.array], mx.array]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    tokens = parser.parse_args().tokens
    backend.prepare()
    print(backend.describe(), f"{tokens} tokens", flush=True)
    for name, (operation, given) in operations(tokens).items():
        build, encode, whole = (1e6 * seconds / COUNT for seconds in timed(operation, given))
        print(f"{name:32} build {build:5.2f}  encode {encode:5.2f}  all {whole:5.2f}", flush=True)
    return 0


def operations(tokens: int) -> dict[str, tuple[Operation, mx.array]]:
    """By name: what is done again and again, and to what first."""

    def matrix(outputs: int, inputs: int) -> mx.array:
        return (mx.random.normal((outputs, inputs)) * inputs**-0.5).astype(mx.bfloat16)

    hidden, other = (mx.random.normal((tokens, 1, HIDDEN)).astype(mx.bfloat16) for _ in range(2))
    square, joined = matrix(HIDDEN, HIDDEN), matrix(HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN)
    gate_up, down, ones = matrix(2 * MLP, HIDDEN), matrix(HIDDEN, MLP), mx.ones(HIDDEN, mx.bfloat16)
    places = mx.arange(tokens, dtype=mx.int32)
    keys = mx.random.normal((tokens, KV_HEADS, HEAD_DIM)).astype(mx.bfloat16)
    pool = mx.zeros((tokens, KV_HEADS, 512, HEAD_DIM), mx.bfloat16)
    mx.eval(hidden, other, square, joined, gate_up, down, ones, places, keys, pool)  # else they are uncaptured inputs

    def norm(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, ones, 1e-5)

    def rope(x: mx.array) -> mx.array:
        heads = x.reshape(tokens, 1, HEADS, HEAD_DIM).transpose(0, 2, 1, 3)
        turned = mx.fast.rope(heads, HEAD_DIM, traditional=False, base=1e4, scale=1.0, offset=places)
        return turned.transpose(0, 2, 1, 3).reshape(tokens, 1, HIDDEN)

    def mlp(x: mx.array) -> mx.array:
        gate, up = mx.split(x @ gate_up.T, 2, axis=-1)
        return (gate * mx.sigmoid(gate) * up) @ down.T

    def write(slots: mx.array) -> mx.array:
        slots[places[:, None], mx.arange(KV_HEADS)[None], places[:, None]] = keys
        return slots

    return {
        "norm": (norm, hidden),
        "sum and norm": (lambda x: norm(x + other), hidden),
        "product": (lambda x: x @ square.T, hidden),
        "product, split in three": (lambda x: mx.split(x @ joined.T, [HIDDEN, 768], axis=-1)[0], hidden),
        "MLP": (mlp, hidden),
        "rotary embedding": (rope, hidden),
        "write to a pool": (write, pool),
        "views alone": (lambda x: x.reshape(tokens, HEADS, -1).transpose(1, 0, 2).transpose(1, 0, 2), hidden),
    }


def timed(operation: Operation, given: mx.array) -> tuple[float, float, float]:
    """Median seconds of COUNT in a row: of building the graph, of handing it to the device, and of all."""

    def chain(x: mx.array) -> mx.array:
        for _ in range(COUNT):
            x = operation(x).reshape(given.shape)
        return x

    function = mx.compile(chain)
    taken = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        result = function(given)
        built = time.perf_counter()
        mx.async_eval(result)
        encoded = time.perf_counter()
        mx.eval(result)
        taken.append((built - began, encoded - built, time.perf_counter() - began))
    build, encode, whole = (statistics.median(column) for column in zip(*taken[2:], strict=True))
    return build, encode, whole


if __name__ == "__main__":
    sys.exit(main())
