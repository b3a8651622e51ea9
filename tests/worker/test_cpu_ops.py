"""The CPU's own forms of slow operations: the same results, for any batch."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from tests.worker import tiny
from worker import cpu_ops
from worker.target import Target

pytestmark = pytest.mark.skipif(not cpu_ops.is_usable(), reason="needs a CPU backend and a C++ compiler")


def close(a: mx.array, b: mx.array, tolerance: float = 3e-6) -> bool:
    return bool(mx.all(mx.abs(a - b) <= tolerance * (1 + mx.abs(b))))


def test_swiglu_is_silu_times_x_over_the_whole_range() -> None:
    gate = mx.linspace(-120, 120, 5001)
    x = mx.ones_like(gate) * 1.5
    assert close(cpu_ops.swiglu(gate, x), nn.silu(gate) * x)
    large = mx.array([1e30, -1e30, float("inf")])
    assert cpu_ops.swiglu(large, mx.ones(3)).tolist()[0] == pytest.approx(1e30)
    assert not mx.any(mx.isnan(cpu_ops.swiglu(large[:2], mx.ones(2))))


def test_attention_is_that_of_mlx() -> None:
    mx.random.seed(1)
    queries, keys, values = (mx.random.normal((3, 2, n, 16)) * 3 for n in (6, 64, 64))
    mask = mx.random.uniform(shape=(3, 1, 6, 64)) < 0.5
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=mask)
    assert close(cpu_ops.attention(queries, keys, values, 0.25, mask), expected)


def test_attention_hides_what_is_masked_even_if_it_is_large_and_gives_zeros_for_nothing() -> None:
    queries, values = mx.ones((1, 1, 2, 4)), mx.ones((1, 1, 32, 4))
    keys = mx.concatenate([mx.ones((1, 1, 16, 4)), mx.ones((1, 1, 16, 4)) * 1e6], axis=2)
    mask = mx.array([[True] * 16 + [False] * 16, [False] * 32])[None, None]
    output = cpu_ops.attention(queries, keys, values, 1.0, mask)
    assert output[0, 0].tolist() == [pytest.approx([1.0] * 4), [0.0] * 4]


@pytest.mark.parametrize("extent", [64, 96, 256])
def test_attention_does_not_depend_on_padding_or_neighbours(extent: int) -> None:
    mx.random.seed(2)
    queries, keys, values = (mx.random.normal((4, 2, n, 16)) for n in (3, extent, extent))
    mask = mx.broadcast_to(mx.arange(extent) < 50, (4, 1, 3, extent))
    alone = cpu_ops.attention(queries[1:2], keys[1:2, :, :64], values[1:2, :, :64], 0.25, mask[1:2, ..., :64])
    assert mx.array_equal(cpu_ops.attention(queries, keys, values, 0.25, mask)[1:2], alone)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RoPE(16, base=50000.0, scale=0.5),
        lambda: nn.RoPE(16, traditional=True),
        lambda: nn.RoPE(8),
        lambda: Llama3RoPE(
            16,
            base=10000.0,
            scaling_config={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_rope_from_tables_is_rope(make: Any) -> None:
    model, plain = nn.Module(), make()
    model.rope = make()
    cpu_ops.install(model)
    for count in (5, 3):
        x, positions = mx.random.normal((count, 2, 1, 16)), mx.arange(count) * 117
        assert close(model.rope(x, offset=positions), plain(x, offset=positions), 1e-5)
        assert close(model.rope(2 * x, offset=positions), plain(2 * x, offset=positions), 1e-5)
    prompt = mx.random.normal((1, 2, 7, 16))
    assert mx.array_equal(model.rope(prompt, offset=3), plain(prompt, offset=3))


@pytest.mark.parametrize("shape", [(1, 1, 48), (7, 1, 48), (2, 3, 5, 48)])
def test_norms_have_the_bits_of_mlxs_own(shape: tuple[int, ...]) -> None:
    mx.random.seed(3)
    model: Any = nn.Module()
    model.norm = nn.RMSNorm(48, eps=1e-4)
    model.norm.weight = mx.random.normal((48,))
    x = mx.random.normal(shape) * 5
    expected, half = model.norm(x), model.norm(x.astype(mx.bfloat16))
    cpu_ops.install(model)
    assert mx.array_equal(model.norm(x), expected)
    assert mx.array_equal(model.norm(x.astype(mx.bfloat16)), half)


def test_a_models_own_files_use_them() -> None:
    model = tiny.make_model("llama")
    Target(model)
    Target(model)
    kinds = {type(part).__mro__[1] for part in model.modules() if type(part).__name__ == "RoPE"}
    assert kinds == {nn.RoPE}
