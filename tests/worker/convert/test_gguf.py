"""GGUF conversion on toys small enough to check by eye."""

from typing import Any

import mlx.core as mx
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from worker.convert.gguf import (
    Attention,
    GgufError,
    build_tokenizer,
    mlx_name,
    model_config,
    to_mlx_weights,
    tokenizer_config,
    unpermute_rope_rows,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ 1", "1 2", "h e", "l l", "he ll", "hell o"]


@pytest.fixture
def metadata() -> dict[str, Any]:
    """A GGUF's metadata with every byte, a few merges (two of them over digits), and a user-defined token."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *merged, "<tool>"]
    return {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 1,
        "llama.context_length": 256,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


def packed(name: str, rows: int, width: int, bits: int) -> dict[str, mx.array]:
    """A quantized GGUF tensor as mx.load gives it: groups of 32, float16 scales and biases."""
    weight, scales, biases = mx.quantize(mx.random.normal((rows, width)), group_size=32, bits=bits)
    half = mx.float16
    return {
        f"{name}.weight": weight,
        f"{name}.scales": scales.astype(half),
        f"{name}.biases": biases.astype(half),
    }


@pytest.fixture
def tensors() -> dict[str, mx.array]:
    mx.random.seed(0)
    return {
        **packed("token_embd", 96, 64, bits=8),
        **packed("blk.0.attn_q", 64, 64, bits=4),
        **packed("blk.0.attn_k", 32, 64, bits=4),
        **packed("blk.0.attn_v", 32, 64, bits=4),
        **packed("blk.0.ffn_down", 64, 128, bits=4),
        "blk.0.attn_norm.weight": mx.ones(64),
    }


# --- rope order


def to_gguf_order(weight: mx.array, heads: int) -> mx.array:
    """What llama.cpp's converter does to q and k (`LlamaModel.permute`)."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def test_unpermute_of_one_head_of_six_rows() -> None:
    rows = mx.array([0, 1, 2, 3, 4, 5])
    assert unpermute_rope_rows(rows, heads=1).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_unpermute_inverts_the_gguf_order(heads: int) -> None:
    weight = mx.random.normal((heads * 8, 5))
    assert mx.array_equal(unpermute_rope_rows(to_gguf_order(weight, heads), heads), weight)


def test_half_split_rope_on_unpermuted_rows_gives_the_scores_of_interleaved_rope() -> None:
    heads, size, tokens = 2, 8, 5
    x = mx.random.normal((tokens, 16), key=mx.random.key(1))
    gguf_q = mx.random.normal((heads * size, 16), key=mx.random.key(2))
    gguf_k = mx.random.normal((heads * size, 16), key=mx.random.key(3))

    def scores(q: mx.array, k: mx.array, traditional: bool) -> mx.array:
        def rotated(weight: mx.array) -> mx.array:  # [heads, tokens, size]
            states = (x @ weight.T).reshape(1, tokens, heads, size).swapaxes(1, 2)
            return mx.fast.rope(states, size, traditional=traditional, base=1e5, scale=1.0, offset=3)[0]

        return rotated(q) @ rotated(k).swapaxes(1, 2)

    expected = scores(gguf_q, gguf_k, traditional=True)
    q, k = unpermute_rope_rows(gguf_q, heads), unpermute_rope_rows(gguf_k, heads)
    assert mx.allclose(scores(q, k, traditional=False), expected, atol=1e-4)
    assert not mx.allclose(scores(gguf_q, gguf_k, traditional=False), expected, atol=1e-1)


# --- weights and config


def test_quantized_rows_move_whole_and_unchanged(tensors: dict[str, mx.array]) -> None:
    weights = to_mlx_weights(tensors, Attention(heads=2, kv_heads=1))

    def dequantized(source: dict[str, mx.array], name: str) -> mx.array:
        weight, scales, biases = (source[f"{name}.{kind}"] for kind in ("weight", "scales", "biases"))
        return mx.dequantize(weight, scales, biases, group_size=32, bits=4)

    for gguf, name, heads in (("attn_q", "q_proj", 2), ("attn_k", "k_proj", 1)):
        expected = unpermute_rope_rows(dequantized(tensors, f"blk.0.{gguf}"), heads)
        assert mx.array_equal(dequantized(weights, f"model.layers.0.self_attn.{name}"), expected)
    value = "model.layers.0.self_attn.v_proj.weight"
    assert mx.array_equal(weights[value], tensors["blk.0.attn_v.weight"])


def test_norms_take_the_dtype_of_the_scales(tensors: dict[str, mx.array]) -> None:
    weights = to_mlx_weights(tensors, Attention(heads=2, kv_heads=1))
    assert weights["model.layers.0.input_layernorm.weight"].dtype == mx.float16


def test_config_names_what_differs_from_the_usual_quantization(
    metadata: dict[str, Any], tensors: dict[str, mx.array]
) -> None:
    config = model_config(metadata, tensors)
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-05, 100000.0)
    assert config["tie_word_embeddings"] is True


def test_unquantized_file_has_no_quantization_entry(metadata: dict[str, Any]) -> None:
    assert "quantization" not in model_config(metadata, {"token_embd.weight": mx.zeros((4, 64), mx.float16)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling"),
    ],
)
def test_model_that_cannot_be_converted_is_named(
    metadata: dict[str, Any], tensors: dict[str, mx.array], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(GgufError, match=message):
        model_config(metadata | change, tensors)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_exps.weight"])
def test_tensor_without_a_place_is_named(name: str) -> None:
    with pytest.raises(GgufError, match=name):
        mlx_name(name)


# --- tokenizer


def test_digits_stand_alone_even_where_a_merge_would_join_them(metadata: dict[str, Any]) -> None:
    assert build_tokenizer(metadata).encode(" 112").tokens == ["Ġ", "1", "1", "2"]
    assert build_tokenizer(metadata | {"tokenizer.ggml.pre": "gpt-2"}).encode(" 112").tokens == ["Ġ1", "12"]


def test_merges_apply_in_order_and_nothing_is_added_around_the_text(metadata: dict[str, Any]) -> None:
    assert build_tokenizer(metadata).encode("hello").tokens == ["hello"]


def test_control_tokens_are_one_token_and_hidden_user_defined_ones_shown(metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode("<|im_start|>hello<tool><|im_end|>").ids
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<tool><|im_end|>"


def test_ids_stay_those_of_the_file(metadata: dict[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [build_tokenizer(metadata).token_to_id(token) for token in tokens] == list(range(len(tokens)))


def test_tokenizer_config_names_tokens_and_template(metadata: dict[str, Any]) -> None:
    config = tokenizer_config(metadata)
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["add_bos_token"] is False
    assert config["chat_template"] == "{{ messages }}"
    assert "pad_token" not in config


def test_unknown_pre_tokenizer_is_an_error_that_names_it(metadata: dict[str, Any]) -> None:
    with pytest.raises(GgufError, match="'llama-bpe'"):
        build_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
