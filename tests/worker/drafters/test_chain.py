"""Drafters that compute: with another model, and with some of the target's own layers."""

from functools import cache
from typing import Any

import pytest

from common.sampling import Sampling, Speculation
from tests.worker import tiny
from worker.cache.layout import Segment
from worker.drafters import trial
from worker.drafters.layers import LayersDrafter, block_influence, most_influential, only_layers
from worker.drafters.model import CATCH_UP_TOKENS, ModelDrafter
from worker.request import Request
from worker.step_times import StepTimes
from worker.taps import NoLayers
from worker.target import Target

TEXT = tuple(range(40))


@cache
def model() -> Any:
    return tiny.make_model("llama")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_model_like_its_target_is_always_right_at_any_temperature(temperature: float) -> None:
    request = tiny.make_request(3, max_tokens=28, sampling=Sampling(temperature=temperature, seed=5))
    engine = tiny.make_engine(model(), tiny.model_drafter(model()))
    tiny.finish(engine, [request])
    assert engine.totals.accepted == engine.totals.drafted > 0
    assert engine.totals.steps < 8


def test_rows_that_ask_for_drafts_of_different_length_share_a_chain() -> None:
    lengths = [1, 4, 2, 8]
    requests = [
        tiny.make_request(i, max_tokens=28, speculation=Speculation(max_draft_tokens=n)) for i, n in enumerate(lengths)
    ]
    expected = tiny.finish(tiny.make_engine(model()), requests)
    engine = tiny.make_engine(model(), tiny.model_drafter(model()))
    assert tiny.finish(engine, requests) == expected
    assert engine.totals.accepted == engine.totals.drafted


def test_a_draft_model_reads_a_long_prompt_in_pieces() -> None:
    prompt = tuple(i % tiny.VOCABULARY for i in range(2 * CATCH_UP_TOKENS + 50))
    engine = tiny.make_engine(model(), tiny.model_drafter(model()))
    engine.submit(Request(request_id="long", prompt=prompt, sampling=Sampling(), max_tokens=20))
    drafted = []
    while engine.has_work:
        drafted.append(engine.step().drafted)
    assert drafted[:3] == [0, 0, 0]  # the prompt, and two steps in which the draft model is still reading
    assert sum(drafted) == engine.totals.accepted > 0


def test_a_draft_model_forgets_rows_that_are_gone() -> None:
    makers: list[ModelDrafter] = []

    def make(target: Target) -> ModelDrafter:
        makers.append(ModelDrafter(Target(model()), tiny.cheap_times(), tiny.VOCABULARY))
        return makers[0]

    engine = tiny.make_engine(model(), make)
    tiny.finish(engine, [tiny.make_request(i, max_tokens=20) for i in range(3)])
    assert makers[0].target.kv_bytes == 0


def test_layers_share_the_targets_cache_and_leave_it_as_it_was() -> None:
    engine = tiny.make_engine(model(), tiny.layers_drafter((0, 2)))
    engine.submit(tiny.make_request(3, max_tokens=28))
    engine.step()
    row = engine.rows[0]
    before = engine.target.kv_bytes
    engine.step()
    assert engine.totals.drafted > 0
    assert engine.target.state.lengths[row.slot] == row.cached
    assert engine.target.kv_bytes == before


def test_all_layers_are_the_model_and_a_skipped_one_is_missed() -> None:
    target = Target(model())
    whole = target.forward([Segment(0, 0, 40)], TEXT, [39]).tolist()
    target.clear()
    with only_layers(target.model, (0, 1, 2)):
        assert target.forward([Segment(0, 0, 40)], TEXT, [39]).tolist() == whole
    target.clear()
    with only_layers(target.model, (0, 2)):
        assert target.forward([Segment(0, 0, 40)], TEXT, [39]).tolist() != whole
    target.clear()
    assert target.forward([Segment(0, 0, 40)], TEXT, [39]).tolist() == whole


def test_the_layers_that_change_most_are_kept() -> None:
    influence = block_influence(Target(model()), TEXT)
    assert len(influence) == 3
    assert all(0 < value < 2 for value in influence)
    assert most_influential([0.5, 0.1, 0.3, 0.2], 0.5) == [0, 2]
    assert most_influential([0.5, 0.1], 0.1) == [0]
    assert most_influential([0.5, 0.1], 0.99) == [0]


def test_a_model_without_a_list_of_layers_says_so() -> None:
    with pytest.raises(NoLayers), only_layers(model().model.embed_tokens, (0,)):
        pass


def test_a_trial_measures_agreement_and_time_and_is_kept(tmp_path: Any) -> None:
    target = Target(model())
    found = trial.try_layers(target, TEXT, 0.7)
    assert len(found.kept) == 2
    assert 0 <= found.agreement < 1
    assert found.times.is_measured
    twin = trial.try_model(target, LayersDrafter(Target(model()), StepTimes(), (0, 1, 2)), TEXT)
    assert twin.agreement == 1.0
    trial.save(found, tmp_path / "kept" / "trial.json")
    assert trial.load(tmp_path / "kept" / "trial.json") == found
    assert trial.load(tmp_path / "nothing.json") is None


@pytest.mark.parametrize(
    ("acceptance", "cost", "expected"),
    [((0.13,), 0.5, False), ((0.9,), 0.1, True), ((0.5,), 0.9, False), ((0.1, 0.9, 0.9), 0.1, False)],
)
def test_auto_uses_what_promises_a_gain(acceptance: tuple[float, ...], cost: float, expected: bool) -> None:
    assert trial.is_promising(acceptance, lambda rows: cost, lambda tokens: 1 + 0.05 * tokens) is expected
