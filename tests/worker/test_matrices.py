"""Joined and reordered matrices give the products of the layers that they are made of."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import MLP, Attention, ModelArgs, TransformerBlock

from worker import backend, matrices
from worker.heads.vocabulary import Rows

pytestmark = pytest.mark.unit

ARGS = ModelArgs(
    model_type="llama",
    hidden_size=64,
    num_hidden_layers=1,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=32,
    attention_bias=True,
)


class Unlike(nn.Module):  # type: ignore[misc]
    """Its keys are made of something else than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        total: mx.array = self.q_proj(x) + self.k_proj(memory) + self.v_proj(memory)
        return total


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rules of each device, on this one; CUDA has memory enough to keep unfolded matrices."""
    monkeypatch.setattr(backend, "name", lambda: request.param)
    monkeypatch.setattr(backend, "memory_bytes", lambda: 1 << 30)
    return str(request.param)


def randomized(module: Any) -> Any:
    mx.random.seed(1)
    module.update(tree_map(lambda array: mx.random.normal(array.shape), module.parameters()))
    return module


@pytest.mark.parametrize("tokens", [1, 7, 8])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("kind", [Attention, MLP])
def test_a_model_file_gets_the_same_products(device: str, kind: Any, bits: int, tokens: int) -> None:
    module = randomized(kind(ARGS))
    if bits:
        nn.quantize(module, group_size=32, bits=bits)
    x = mx.random.normal((tokens, 1, 64))
    expected, before = module(x), dict(tree_flatten(module.parameters()))
    mx.eval(expected)
    matrices.install(module)
    matrices.install(module)  # once more changes nothing
    assert mx.allclose(module(x), expected, rtol=1e-5, atol=1e-4)
    after = dict(tree_flatten(module.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_layers_that_read_the_same_are_one_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kind: Any = {"cpu": matrices.ByInputs, "cuda": nn.Linear}[device]
    original: Any = kind.__call__

    def counted(self: Any, x: mx.array) -> mx.array:
        calls.append(1)
        product: mx.array = original(self, x)
        return product

    monkeypatch.setattr(kind, "__call__", counted)
    module: Any = Attention(ARGS)
    matrices.install(module)
    module(mx.ones((3, 1, 64)))
    module(mx.ones((3, 1, 64)))
    assert len(calls) == 4  # all of queries, keys and values, and the output, twice


def test_a_part_can_be_asked_for_alone_and_again(device: str) -> None:
    module = randomized(Attention(ARGS))
    x, y = mx.random.normal((2, 1, 64)), mx.random.normal((2, 1, 64))
    expected = [module.q_proj(x), module.q_proj(y), module.v_proj(y), module.v_proj(y)]
    matrices.install(module)
    got = [module.q_proj(x), module.q_proj(y), module.v_proj(y), module.v_proj(y)]
    assert all(mx.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(expected, got, strict=True))


def test_layers_that_read_different_things_or_are_unlike_stay_apart(device: str) -> None:
    unlike: Any = Unlike()
    mixed: Any = Attention(ARGS)
    mixed.k_proj = nn.QuantizedLinear.from_linear(mixed.k_proj, group_size=32, bits=4)
    for module in (unlike, mixed):
        matrices.install(module)
        assert type(module.q_proj) is {"cpu": matrices.ByInputs, "cuda": nn.Linear}[device]


@pytest.mark.parametrize("has_bias", [False, True])
def test_on_a_cpu_a_layer_multiplies_by_its_matrix_as_it_is_stored(has_bias: bool) -> None:
    if backend.name() != "cpu":
        pytest.skip("needs a CPU backend")
    module: Any = nn.Module()
    module.layer = randomized(nn.Linear(64, 48, bias=has_bias))
    x = mx.random.normal((3, 1, 64))
    expected = module.layer(x)
    mx.eval(expected, module.parameters())
    before = mx.get_active_memory()
    matrices.install(module)
    assert type(module.layer) is matrices.ByInputs
    assert mx.allclose(module.layer(x), expected, rtol=1e-5, atol=1e-4)
    assert mx.get_active_memory() - before < module.layer.weight.nbytes  # nothing is kept twice
    assert set(module.layer.parameters()) == ({"weight", "bias"} if has_bias else {"weight"})


def test_on_a_cpu_matrices_are_stored_by_inputs() -> None:
    if backend.name() != "cpu":
        pytest.skip("needs a CPU backend")
    matrix = mx.random.normal((6, 4))
    stored = matrices.ordered(matrix)
    assert mx.array_equal(stored, matrix)
    assert memoryview(stored).strides == (4, 24)  # type: ignore[arg-type]
    half = matrix.astype(mx.bfloat16)
    assert matrices.ordered(half) is half


def test_on_cuda_a_long_quantized_matrix_is_unfolded_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "name", lambda: "cuda")
    monkeypatch.setattr(matrices, "_UNFOLD_INPUTS", 64)
    weight, scales, biases = mx.quantize(mx.random.normal((32, 64)), group_size=32, bits=4)
    form: dict[str, Any] = {"scales": scales, "biases": biases, "group_size": 32, "bits": 4, "mode": "affine"}
    for tokens in (1, 8):
        x = mx.random.normal((tokens, 1, 64))
        expected = mx.quantized_matmul(x, weight, transpose=True, **form)
        assert mx.allclose(matrices.quantized_product(x, weight, **form), expected, rtol=1e-4, atol=1e-4)
    assert not matrices.is_unfolded(7, 1 << 16, 1 << 16)
    assert matrices.is_unfolded(8, 64, 32)
    assert not matrices.is_unfolded(8, 32, 32)


@pytest.mark.parametrize("memory_bytes", [16 * 2 * 64 * 4, 0])
def test_rows_of_a_vocabulary_are_kept_unfolded_as_well(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    embedding = nn.QuantizedEmbedding(32, 64, group_size=32, bits=4)
    rows = Rows.of(embedding, mx.array([3, 5]))
    monkeypatch.setattr(backend, "name", lambda: "cuda")
    monkeypatch.setattr(backend, "memory_bytes", lambda: memory_bytes)
    kept = rows.kept()
    assert (kept.unfolded is not None) == bool(memory_bytes)
    for tokens in (2, 9):
        x = mx.random.normal((tokens, 1, 64))
        assert mx.allclose(kept(x), embedding.as_linear(x)[..., mx.array([3, 5])], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_bytes", [16 * 4 * 64 * (64 + 2 * 32 + 64 + 3 * 128), 0])
def test_on_cuda_unfolded_matrices_are_kept_if_they_are_small(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    monkeypatch.setattr(backend, "name", lambda: "cuda")
    monkeypatch.setattr(backend, "memory_bytes", lambda: memory_bytes)
    unfolded: list[int] = []
    original = mx.dequantize
    block: Any = TransformerBlock(ARGS)
    nn.quantize(block, group_size=32, bits=4)
    matrices.install(block)
    assert matrices.kept_bytes(block) == memory_bytes // 16
    matrices.install(block)
    assert matrices.kept_bytes(block) == memory_bytes // 16
    monkeypatch.setattr(matrices, "_UNFOLD_INPUTS", 0)
    monkeypatch.setattr(mx, "dequantize", lambda *args, **form: unfolded.append(1) or original(*args, **form))
    block.mlp(mx.ones((8, 1, 64)))
    assert len(unfolded) == (0 if memory_bytes else 2)  # gate and up, and down
