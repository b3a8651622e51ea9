"""Search, popular and info against a hub over HTTP, and the verdict on what this machine can run."""

import json
from pathlib import Path

import pytest

from common import footprint
from common.errors import ConfigError, HubUnreachable, InvalidValue
from router.hub import catalog, fit
from router.hub.download import fetch
from router.hub.query import Query
from router.hub.store import Store
from router.hub.wishes import Wish
from tests.e2e.server import free_port
from tests.hub.fake_hub import COMMIT, FakeHub


def ids(found: list[catalog.Found]) -> list[str]:
    return [model.id for model in found]


def test_mlx_models_come_first(hub: FakeHub, store: Store) -> None:
    hub.repos["acme/tiny-qwen3"].tags.append("mlx")
    every = ids(catalog.search(Query(query="tiny"), store))
    assert every == ["acme/tiny-qwen3", "acme/tiny-gemma3", "acme/tiny-llama", "acme/tiny-mistral"]
    assert ids(catalog.search(Query(query="tiny", library="mlx"), store)) == ["acme/tiny-qwen3"]
    assert ids(catalog.search(Query(query="LLAMA"), store)) == ["acme/tiny-llama"]
    assert len(catalog.search(Query(limit=2), store)) == 2


def test_search_filters_by_license_and_size(hub: FakeHub, store: Store) -> None:
    hub.repos["acme/tiny-llama"].tags = ["license:apache-2.0"]
    (model,) = catalog.search(Query(license="apache-2.0"), store)
    assert (model.id, model.license, model.is_local) == ("acme/tiny-llama", "apache-2.0", False)
    assert model.size_bytes
    assert model.quantization == "bfloat16"
    assert catalog.search(Query(max_size_gb=model.size_bytes / 2e9), store) == []


@pytest.mark.parametrize(
    "query", [Query(sort="x"), Query(limit=0), Query(library="x"), Query(task="x"), Query(max_size_gb=-1.0)]
)
def test_impossible_queries_are_refused(query: Query, store: Store) -> None:
    with pytest.raises(InvalidValue):
        catalog.search(query, store)


def test_no_network_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(HubUnreachable):
        catalog.search(Query(), store)


def test_address_that_is_none_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT is 'huggingface\.co'"):
        catalog.search(Query(), store)


def test_popular_puts_models_with_a_trained_head_first(hub: FakeHub, store: Store, home: Path) -> None:
    for repo in hub.repos.values():
        repo.tags.append("mlx")
    head = home / "drafts" / "head"
    head.mkdir(parents=True)
    (head / "config.json").write_text("{}")
    (head / "report.json").write_text(json.dumps({"model": "tiny-mistral", "is_used": True}))
    found = catalog.popular(store)
    assert (found[0].id, found[0].drafts) == ("acme/tiny-mistral", ["head"])
    assert len(found) == 4
    assert [model.id for model in catalog.popular(store, limit=1)] == ["acme/tiny-mistral"]
    hub.repos["acme/tiny-mistral"].tags.remove("mlx")
    assert catalog.popular(store)[0].id == "acme/tiny-mistral"


def test_info_tells_of_hub_and_local_models_alike(hub: FakeHub, store: Store) -> None:
    there = catalog.info("acme/tiny-llama", store)
    assert (there.source, there.revision, there.architecture, there.license) == ("hub", COMMIT, "llama", "mit")
    assert (there.fit.can_run, there.fit.reason, there.local_path) == (True, "", None)
    assert there.context_tokens == 512
    assert there.drafters.copying == ["suffix", "ngram"]
    fetch(Wish(id="acme/tiny-llama"), store)
    here = catalog.info("acme/tiny-llama", store)
    assert (here.source, here.local_path) == ("local", str(store.find("acme/tiny-llama")))
    assert here.fit.needed_bytes == pytest.approx(there.fit.needed_bytes, rel=0.01)
    assert (here.size_bytes, here.license) == (there.size_bytes, there.license)


def test_need_grows_with_the_form_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama", "quantization": {"bits": 4, "group_size": 64}}
    parameters = {"U32": 1000, "F16": 10}
    monkeypatch.setattr(footprint, "computes_on_cpu", lambda: True)
    assert fit.element_count(parameters, config) == 8000
    assert fit.served_bytes(parameters, config, 4020) == 4 * 8000
    monkeypatch.setattr(footprint, "computes_on_cpu", lambda: False)
    assert fit.served_bytes(parameters, config, 4020) == 4020


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        ({"model_type": "llama"}, 10, ""),
        ({"model_type": "mistral"}, 10, ""),
        ({"model_type": "nonsense"}, 10, "mlx-lm has no model type 'nonsense'"),
        ({"model_type": "llama", "model_file": "x.py"}, 10, "own code"),
        ({}, 10, "names no model_type"),
        ({"model_type": "llama"}, None, "no model"),
        ({"model_type": "llama"}, 2**50, "GiB may be used"),
    ],
)
def test_verdict_has_its_reason(config: dict[str, str], weights: int | None, says: str) -> None:
    verdict = fit.judge(config, weights)
    assert verdict.can_run is not bool(says)
    assert says in verdict.reason
