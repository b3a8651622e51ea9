"""Which modules are found to use which cache."""

import pytest
from mlx_lm.models.cache import make_prompt_cache

from tests.worker import families, tiny
from worker.cache.wiring import members_of, trace


@pytest.mark.parametrize(
    ("kind", "receivers"),
    [
        ("rwkv7", ["Rwkv7TimeMixing", "Rwkv7ChannelMixing"]),
        ("recurrent_gemma", ["RecurrentBlock"]),
        ("deepseek_v3", ["DeepseekV3Attention"]),
    ],
)
def test_innermost_modules_that_are_called_with_a_cache(kind: str, receivers: list[str]) -> None:
    model = families.make_model(kind)
    caches = make_prompt_cache(model)
    assert [type(module).__name__ for module in trace(model, caches).receivers[id(caches[0])]] == receivers


def test_a_list_of_caches_is_found_with_whoever_takes_it_apart() -> None:
    model = families.make_model("falcon_h1")
    caches = make_prompt_cache(model)
    found = trace(model, caches).receivers
    names = [type(found[id(member)][0]).__name__ for member in members_of(caches[0])]
    assert names == ["FalconH1Mixer", "FalconH1Attention"]
    model = families.make_model("baichuan_m1")
    caches = make_prompt_cache(model)
    found = trace(model, caches).receivers
    assert [type(module).__name__ for module in found[id(caches[0])]] == ["Attention"]
    assert not any(id(member) in found for member in members_of(caches[0]))


def test_attention_is_plain_if_keys_values_and_mask_go_straight_to_it() -> None:
    plain, latent = tiny.make_model("gemma3"), families.make_model("deepseek_v3")
    for model, is_plain in ((plain, True), (latent, False)):
        caches = make_prompt_cache(model)
        assert trace(model, caches).plain == ({id(cache) for cache in caches} if is_plain else set())


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = families.make_model("jamba")
    calls = {type(module): type(module).__call__ for module in model.modules() if callable(module)}
    trace(model, make_prompt_cache(model))
    assert calls == {kind: kind.__call__ for kind in calls}
