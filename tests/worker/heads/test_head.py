"""The head's module, its folder and the identity of its target."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest

from tests.worker import tiny
from worker.cache.attention import attention_style, install
from worker.cache.layout import Segment
from worker.cache.ragged import RaggedKVCache, RaggedState
from worker.heads import folder
from worker.heads.head import Head, HeadConfig
from worker.heads.identity import identity

CONFIG = {"model_type": "llama", "hidden_size": 64}


def wide_model() -> Any:
    """One that can be quantized."""
    return tiny.randomized(tiny.llama_model(hidden_size=64, heads=4), seed=3)


def make_head(model: Any, target: str = "one", bits: int = 0) -> Head:
    size = model.args.hidden_size
    config = HeadConfig(
        target=target, taps=(0, 1), hidden_size=size, heads=4, kv_heads=2, head_dim=16, mlp_size=64, bits=bits
    )
    head = tiny.randomized(Head(config, mx.array([3, 5, 7, 90], dtype=mx.int32)), seed=1)
    if bits:
        nn.quantize(head, 64, bits)
    return head.bind(model)


def test_packed_steps_on_a_ragged_cache_give_what_a_causal_batch_gives() -> None:
    model = wide_model()
    head = make_head(model)
    taps = [mx.random.normal((1, 6, 64)) for _ in range(2)]
    tokens = mx.array([[4, 8, 15, 16, 23, 42]])
    expected = head.logits(head(head.fuse(taps), head.embed(tokens), mask="causal"))

    install(head)
    state = RaggedState(attention_style())
    caches = [RaggedKVCache(state)]
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        state.begin([Segment(1, start, end - start)])
        features = head.fuse([tap[0, start:end, None] for tap in taps])
        mask = caches[0].make_mask(1)
        parts.append(head.logits(head(features, head.embed(tokens[0, start:end, None]), caches, mask)))
        state.commit(1, end)
    assert expected.shape == (1, 6, 4)
    assert mx.allclose(mx.concatenate(parts)[:, 0], expected[0], atol=1e-4)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_logits_are_the_targets_own_rows(is_quantized: bool) -> None:
    model = wide_model()
    if is_quantized:
        nn.quantize(model, 32, 8)
    head = make_head(model)
    hidden = mx.random.normal((2, 3, 64))
    full = model.model.embed_tokens.as_linear(head.norm(hidden))
    assert mx.allclose(head.logits(hidden), full[..., head.vocabulary], atol=1e-4)
    assert "_rows" not in head.parameters() and "_embedding" not in head.parameters()


@pytest.mark.parametrize("bits", [0, 8])
def test_a_head_comes_back_from_its_folder(tmp_path: Path, bits: int) -> None:
    model = wide_model()
    head = make_head(model, bits=bits)
    folder.save(head, tmp_path / "one")
    again = folder.load(tmp_path / "one", "one", model)
    taps = [mx.random.normal((1, 4, 64)) for _ in range(2)]
    both = [
        one.logits(one(one.fuse(taps), one.embed(mx.array([[1, 2, 3, 4]])), mask="causal")) for one in (head, again)
    ]
    assert mx.array_equal(*both)
    assert not list((tmp_path / "one").glob("partial*"))


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    folder.save(make_head(wide_model()), tmp_path)
    with pytest.raises(folder.WrongTarget, match="made for another model"):
        folder.load(tmp_path, "two")


def test_a_head_that_does_not_pay_is_listed_and_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    for name, is_used in (("a", False), ("b", True)):
        folder.save(make_head(wide_model()), folder.heads_dir() / name)
        (folder.heads_dir() / name / folder.REPORT).write_bytes(msgspec.json.encode(folder.Verdict(is_used)))
    found = folder.find("one")
    assert found is not None and found.name == "b"
    assert [entry.name for entry in folder.entries() if entry.config.target == "one"] == ["a", "b"]
    assert folder.find("another") is None
    folder.remove(found)
    assert folder.find("one") is None


def test_identity_outlives_quantizing_and_conversion_and_tells_models_apart() -> None:
    one = identity(wide_model(), CONFIG)
    quantized, half, other = wide_model(), wide_model(), wide_model()
    nn.quantize(quantized, 32, 4)
    half.set_dtype(mx.bfloat16)
    other.model.norm.weight = other.model.norm.weight * 1.1
    assert identity(quantized, CONFIG) == identity(half, CONFIG) == one
    assert identity(other, CONFIG) != one
    assert identity(wide_model(), CONFIG | {"hidden_size": 65}) != one
