"""Estimates from headers alone, on tiny safetensors files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common import footprint
from common.config import SupervisorConfig
from common.messages import Heartbeat
from router.supervisor import memory

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
}
SIZES = {"F32": 4, "U32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1}
KV_TOKEN_ITEMS = 2 * 2 * 2 * 8  # keys and values, layers, heads, head size


def write_model(folder: Path, tensors: dict[str, tuple[str, list[int]]], config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return str(folder)


def weights_of(need: int | None, kv_item_bytes: int) -> int:
    assert need is not None
    return need - memory.PROCESS_BYTES - memory.ADMITTED_TOKENS * KV_TOKEN_ITEMS * kv_item_bytes


PLAIN = {"a.weight": ("BF16", [32, 64]), "b.bias": ("BF16", [32]), "ids": ("I64", [10])}
PACKED = {
    "a.weight": ("U32", [32, 8]),  # 64 inputs of 4 bits
    "a.scales": ("BF16", [32, 2]),  # in groups of 32
    "a.biases": ("BF16", [32, 2]),
    "e.weight": ("U32", [100, 8]),  # 32 inputs of 8 bits
    "e.scales": ("BF16", [100, 2]),  # in groups of 16
    "e.biases": ("BF16", [100, 2]),
    "norm.weight": ("BF16", [64]),
}
QUANTIZATION = {"quantization": {"group_size": 32, "bits": 4, "e": {"group_size": 16, "bits": 8}}}


@pytest.mark.parametrize(
    ("form", "item_bytes", "expected"),
    [
        ("stored", 2, (32 * 64 + 32) * 2 + 80),
        ("float32", 4, (32 * 64 + 32) * 4 + 80),
        ("bfloat16", 2, (32 * 64 + 32) * 2 + 80),
    ],
)
def test_plain_weights(tmp_path: Path, form: str, item_bytes: int, expected: int) -> None:
    need = memory.estimate_need(write_model(tmp_path / "m", PLAIN, CONFIG), form)
    assert weights_of(need, item_bytes) == expected


@pytest.mark.parametrize(
    ("form", "item_bytes", "expected"),
    [
        ("stored", 2, 32 * 8 * 4 + 2 * 32 * 2 * 2 + 100 * 8 * 4 + 2 * 100 * 2 * 2 + 64 * 2),
        ("float32", 4, (32 * 64 + 100 * 32 + 64) * 4),
        ("float16", 2, (32 * 64 + 100 * 32 + 64) * 2),
    ],
)
def test_packed_weights_grow_when_they_are_unpacked(tmp_path: Path, form: str, item_bytes: int, expected: int) -> None:
    need = memory.estimate_need(write_model(tmp_path / "m", PACKED, CONFIG | QUANTIZATION), form)
    assert weights_of(need, item_bytes) == expected


def test_auto_means_float32_where_mlx_computes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "computes_on_cpu", lambda: True)
    assert memory.served_form("auto") == "float32"
    assert memory.served_form("stored") == "stored"
    monkeypatch.setattr(footprint, "computes_on_cpu", lambda: False)
    assert memory.served_form("auto") == "stored"


@pytest.mark.parametrize(
    ("config", "items"),
    [
        (CONFIG, KV_TOKEN_ITEMS),
        (CONFIG | {"head_dim": 16}, 2 * KV_TOKEN_ITEMS),
        ({"text_config": CONFIG, "hidden_size": 1}, KV_TOKEN_ITEMS),
        ({k: v for k, v in CONFIG.items() if k != "num_key_value_heads"}, 2 * KV_TOKEN_ITEMS),
        ({}, 0),
        ({"num_hidden_layers": "many"}, 0),
    ],
)
def test_kv_bytes_come_from_the_config(config: dict[str, Any], items: int) -> None:
    assert memory.kv_bytes_per_token(config, "float32") == 4 * items
    assert memory.kv_bytes_per_token(config, "stored") == 2 * items


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 16,
        b"\x05" + b"\x00" * 7 + b"nojsn",
        b"\x02" + b"\x00" * 7 + b"[]",
        (b'{"x": {"dtype": 7, "shape": [1]}, "y": {"dtype": "F32", "shape": [-1]}}').join([b"\x48" + bytes(7), b""]),
    ],
    ids=range(6),
)
def test_broken_file_counts_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert memory.read_header(tmp_path / "model.safetensors") == {}
    assert memory.estimate_need(str(tmp_path), "stored") == memory.PROCESS_BYTES


@pytest.mark.parametrize("path", ["/nowhere/at/all", "no-such-org/no-such-model", "not a path", "a/../b"])
def test_model_that_is_not_here_has_no_estimate(path: str) -> None:
    assert memory.estimate_need(path, "stored") is None
    assert memory.fingerprint(path) is None


def test_fingerprint_sees_a_change(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", PLAIN, CONFIG)
    before = memory.fingerprint(path)
    assert memory.fingerprint(path) == before
    (tmp_path / "m" / "config.json").write_text("{ }")
    assert memory.fingerprint(path) != before


def test_charge_is_the_larger_of_counters_and_footprint() -> None:
    def beat(footprint: int) -> Heartbeat:
        return Heartbeat(
            loop_seq=1,
            phase="idle",
            running=0,
            waiting=0,
            finished=0,
            active_bytes=10,
            cache_bytes=5,
            footprint_bytes=footprint,
        )

    assert memory.charge(beat(12)) == 15
    assert memory.charge(beat(20)) == 20


def test_budget_is_configured_or_a_share_of_the_machine() -> None:
    assert memory.budget(SupervisorConfig(memory_limit_gb=2)) == 2 * memory.GIB
    assert memory.budget(SupervisorConfig()) > 0
