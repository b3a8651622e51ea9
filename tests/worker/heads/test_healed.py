"""Healed layers: what they share with their target, what they add, and the folder that keeps that."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.worker import tiny
from tests.worker.heads.test_head import make_head
from worker.heads import folder
from worker.heads.healed import HealedConfig, HealedLayers
from worker.heads.vocabulary import Rows
from worker.taps import NoLayers
from worker.training.acceptance import right_drafts
from worker.training.answers import Answers
from worker.training.reading import Reader

TOKENS = mx.array([[4, 8, 15, 16, 23, 42]])


def model_with(bits: int = 0) -> Any:
    model = tiny.randomized(tiny.llama_model(hidden_size=64, heads=4), seed=3)
    if bits:
        nn.quantize(model, 32, bits)
    model.freeze()
    return model


def fresh(model: Any, kept: tuple[int, ...]) -> HealedLayers:
    return HealedLayers(HealedConfig(target="one", kept=kept, rank=4), mx.array([3, 5, 7, 90]), model)


@pytest.mark.parametrize("bits", [0, 8])
def test_all_layers_with_fresh_adapters_are_the_target(bits: int) -> None:
    model = model_with(bits)
    count = len(model.layers)
    healed = fresh(model, tuple(range(count)))
    expected = model(TOKENS)
    assert mx.allclose(healed.model(TOKENS), expected, atol=1e-5)
    assert mx.allclose(healed.rows(healed.states(TOKENS)), expected[..., healed.vocabulary], atol=1e-4)
    assert not mx.allclose(fresh(model, (0,)).model(TOKENS), expected, atol=0.1)


def test_only_adapters_are_trained_and_the_target_stays_as_it_is() -> None:
    model = model_with()
    before, names = model(TOKENS), [name for name, _ in tree_flatten(model.parameters())]
    healed = tiny.make_healed(model)
    assert len(healed.adapters()) == 2 * 2 * 7  # two factors, two layers, seven matrices
    assert all(4 in array.shape for array in healed.adapters().values())
    assert healed.layers[0].self_attn.q_proj.linear.weight is model.layers[0].self_attn.q_proj.weight
    assert not mx.allclose(healed.model(TOKENS), fresh(model, (0, 1)).model(TOKENS), atol=0.1)
    assert mx.array_equal(model(TOKENS), before)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert not tree_flatten(model.trainable_parameters())


@pytest.mark.parametrize("bits", [0, 8])
def test_they_come_back_from_their_folder(bits: int, tmp_path: Path) -> None:
    model = model_with(bits)
    healed = tiny.make_healed(model)
    folder.save(healed, tmp_path)
    again = folder.load_any(tmp_path, "one", model, mx.float32)
    assert isinstance(again, HealedLayers) and again.config == healed.config
    assert mx.array_equal(again.model(TOKENS), healed.model(TOKENS))
    assert again.vocabulary.tolist() == healed.vocabulary.tolist()


def test_another_model_another_kind_and_other_layers_are_refused(tmp_path: Path) -> None:
    model = model_with()
    folder.save(tiny.make_healed(model), tmp_path / "layers")
    folder.save(make_head(model), tmp_path / "head")
    with pytest.raises(folder.WrongTarget, match=r"the layers in .* made for another model"):
        folder.load_layers(tmp_path / "layers", "two", model, mx.float32)
    with pytest.raises(folder.BadHead, match="of the kind layers, not a head"):
        folder.load(tmp_path / "layers", "one")
    with pytest.raises(folder.BadHead, match="of the kind head, not healed layers"):
        folder.load_layers(tmp_path / "head", "one", model, mx.float32)
    with pytest.raises(folder.BadHead, match="do not fit"):
        folder.load_layers(tmp_path / "layers", "one", tiny.make_model("llama"), mx.float32)
    with pytest.raises(NoLayers, match=r"layers \[7\] are kept"):
        fresh(model, (0, 7))


def test_a_head_and_healed_layers_are_found_by_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    model = model_with()
    folder.save(tiny.make_healed(model), folder.heads_dir() / "a")
    assert folder.find("one") is None
    folder.save(make_head(model), folder.heads_dir() / "b")
    found = [folder.find("one", kind) for kind in (folder.HEAD, folder.LAYERS)]
    assert [entry.name for entry in found if entry is not None] == ["b", "a"]


def test_all_drafts_of_all_layers_are_right() -> None:
    """What is predicted of their acceptance, on a text that the target wrote."""
    model = model_with()
    tokens = TOKENS
    for _ in range(10):
        tokens = mx.concatenate([tokens, mx.argmax(model(tokens)[:, -1:], axis=-1).astype(mx.int32)], axis=1)
    text = Answers(np.array(tokens), np.array([6]), np.array([16]), 0.0, 0)
    shares = []
    for kept in (tuple(range(len(model.layers))), (0,)):
        healed = fresh(model, kept)
        healed.predict_all()
        reader = Reader(model, healed)
        shares.append(right_drafts(healed, reader, text, passes=3)[:, :, 5:14].mean())
        reader.close()
    assert shares[0] == 1.0 and shares[1] < 0.9
    assert Rows.of(model.model.embed_tokens).weight.shape[0] == len(healed.vocabulary)
