"""Checkpoints of four families become MLX models of other forms, by a process that leaves nothing half-made."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from common.errors import ConfigError, Conflict, InvalidValue
from common.forms import FORMS
from router.hub.conversion import convert
from router.hub.download import fetch
from router.hub.store import Store
from router.hub.wishes import Wish
from tests.hub.checkpoints import KINDS
from tests.hub.fake_hub import FakeHub
from worker.convert import mlx as converter

MODULE = "worker.convert.mlx"


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_becomes_a_4_bit_model(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converter.convert(checkpoints / kind, out, "q4")
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 64)
    model, _ = load_model(out)
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 259)
    assert not bool(mx.isnan(logits).any())
    assert not list(out.glob("*.py"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_its_name_says(form: str, checkpoints: Path, tmp_path: Path) -> None:
    converter.convert(checkpoints / "llama", tmp_path / "out", form)
    arrays = dict(tree_flatten(load_model(tmp_path / "out")[0].parameters()))
    weight = arrays["model.layers.0.mlp.up_proj.weight"]
    if form.startswith("q"):
        assert (weight.dtype, weight.shape[1]) == (mx.uint32, 64 * int(form[1:]) // 32)
    elif form == "mxfp4":
        assert arrays["model.layers.0.mlp.up_proj.scales"].shape == (192, 2)
    else:
        floats = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
        assert weight.dtype == floats[form]


def test_quantized_model_can_be_unfolded_and_packed_anew(checkpoints: Path, tmp_path: Path) -> None:
    converter.convert(checkpoints / "llama", tmp_path / "a", "q8")
    converter.convert(tmp_path / "a", tmp_path / "b", "f32")
    assert "quantization" not in json.loads((tmp_path / "b" / "config.json").read_text())
    converter.convert(tmp_path / "a", tmp_path / "c", "q4", 32)
    quantization = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)


def test_child_tells_why_it_cannot(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Conflict, match="exists already"):
        converter.convert(checkpoints / "llama", out, "q4")
    with pytest.raises(ConfigError, match=r"cannot read .*config.json"):
        convert(tmp_path / "nowhere", tmp_path / "other", "q4")
    with pytest.raises(InvalidValue, match="groups of 128 divide"):
        converter.convert(checkpoints / "llama", tmp_path / "other", "q4", 128)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_conversion_leaves_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """The child is stopped with its folder half-made, then killed; the next conversion also sweeps up."""
    half = tmp_path / ".out-999999"
    half.mkdir()
    command = [sys.executable, "-P", "-m", MODULE, str(checkpoints / "llama"), str(tmp_path / "out"), "--form", "q4"]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 30
    while half.exists():  # it sweeps just before it begins to write
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", f".out-{child.pid}"}
    converter.convert(checkpoints / "llama", tmp_path / "other", "q4")
    if (tmp_path / "out").exists():
        assert load_model(tmp_path / "out")


def test_download_in_another_form_stands_beside_the_first(hub: FakeHub, store: Store) -> None:
    with pytest.raises(InvalidValue):
        fetch(Wish(id="acme/tiny-qwen3", quantize="q4", group_size=128), store)
    assert store.models() == []
    hub.served.clear()
    folder = fetch(Wish(id="acme/tiny-qwen3", quantize="q4"), store)
    assert hub.served == {}  # a failed conversion keeps what was downloaded
    assert folder == store.root / "acme" / "tiny-qwen3-q4"
    (model,) = store.models()
    assert (model.name, model.quantization, model.origin) == ("acme/tiny-qwen3-q4", "4-bit", "acme/tiny-qwen3")
    assert store.verify(model.name) == []
    assert store.unfinished() == []
