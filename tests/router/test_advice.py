"""GET /optimize: one recommendation for each figure that is out of order, none for the others."""

from collections import Counter
from typing import Any

import msgspec
import pytest

from common.config import Config, SpeculationConfig
from common.messages import ModelEntry, WorkerEntry
from common.states import WorkerState
from router import advice
from router.ledger import ModelTotals
from tests.fakes import Cluster, FakeWorker
from tests.router.client import post
from tests.router.test_status import LOAD

MODEL = ModelEntry(name="m", path="", state=WorkerState.READY)
GOOD = {
    "outcomes": Counter(stop=100),
    "drafted_tokens": 1000,
    "accepted_tokens": 500,
    "elapsed_s": 100.0,
    "queue_s": 5.0,
}
CALM = msgspec.structs.replace(LOAD, preempted=0)


@pytest.mark.parametrize(
    ("figures", "setting", "words"),
    [
        ({}, None, ""),
        ({"accepted_tokens": 100}, "speculation.max_draft_tokens", "lower it from 8 to 4"),
        ({"accepted_tokens": 900}, "speculation.max_draft_tokens", "raise it from 8 to 16"),
        ({"plain_decode_s": 9.0, "measured_decode_s": 10.0}, "models.m.drafter", "none"),
        ({"accepted_tokens": 1, "drafted_tokens": 10}, None, ""),
        ({"queue_s": 40.0}, "models.m.max_batch_size", "raise it from 32"),
        ({"outcomes": Counter(stop=95, overloaded=5)}, "engine.max_waiting", "raise it"),
        ({"outcomes": Counter(overloaded=5)}, None, ""),
    ],
)
def test_figure_out_of_order_is_told(figures: dict[str, Any], setting: str | None, words: str) -> None:
    found = list(advice.on_model(MODEL, ModelTotals(**GOOD | figures), [CALM], Config()))
    assert [(one.setting, words in one.change) for one in found] == ([(setting, True)] if setting else [])


def test_drafts_are_not_lengthened_without_end() -> None:
    config = Config(speculation=SpeculationConfig(max_draft_tokens=32))
    assert list(advice.on_model(MODEL, ModelTotals(**GOOD | {"accepted_tokens": 900}), [CALM], config)) == []


def test_preemptions_and_deaths_are_told() -> None:
    model = msgspec.structs.replace(MODEL, restarts=5, detail="out of memory")
    settings = [one.setting for one in advice.on_model(model, ModelTotals(**GOOD), [LOAD], Config())]
    assert settings == ["supervisor.memory_limit_gb", "engine.kv_headroom_tokens"]


def test_full_memory_is_told_only_if_somebody_waits_outside() -> None:
    worker = WorkerEntry(identity="m#1", token="", state=WorkerState.READY, pid=1, footprint_bytes=90)
    full = msgspec.structs.replace(MODEL, workers=(worker,))
    outside = msgspec.structs.replace(MODEL, name="n", state=WorkerState.STOPPED)
    assert [one.measured for one in advice.on_memory([full, outside], 100)] == [0.9]
    assert list(advice.on_memory([full], 100)) == []
    assert list(advice.on_memory([full, outside], 200)) == []


async def test_route_tells_how_much_it_rests_on(cluster: Cluster, worker: FakeWorker) -> None:
    await post(cluster, "/generate", prompt="Hi", max_tokens=1)
    async with cluster.http.get("/optimize") as response:
        assert (response.status, await response.json()) == (200, {"requests": 1, "recommendations": []})
