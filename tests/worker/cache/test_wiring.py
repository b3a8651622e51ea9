"""Which modules are found to use which cache."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
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


class Loud(nn.RoPE):
    """Does more than rotate."""

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        return 2.0 * super().__call__(x, offset=offset)


class Rotating(nn.RMSNorm):
    """Rotates its input before it does anything else."""

    def __call__(self, x: Any) -> Any:
        return super().__call__(nn.RoPE(8)(x))


def louder(model: Any) -> None:
    model.layers[1].self_attn.rope.__class__ = Loud


def rotating(model: Any) -> None:
    model.layers[1].self_attn.q_norm.__class__ = Rotating


def without_positions(model: Any) -> None:
    model.layers[1].self_attn.rope = lambda x, offset=0: x


@pytest.mark.parametrize(
    ("change", "is_straight"),
    [(lambda model: None, True), (without_positions, True), (louder, False), (rotating, False)],
)
def test_rotary_embeddings_are_straight_if_attention_gets_what_they_made(
    change: Callable[[Any], None], is_straight: bool
) -> None:
    model = tiny.make_model("qwen3")
    change(model)
    assert trace(model, make_prompt_cache(model), [nn.RoPE]).is_straight == is_straight


def test_layers_that_share_a_cache_are_not_straight() -> None:
    model = tiny.make_model("qwen3")
    cache = make_prompt_cache(model)[0]
    assert not trace(model, [cache, cache], [nn.RoPE]).is_straight


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = families.make_model("jamba")
    calls = {type(module): type(module).__call__ for module in model.modules() if callable(module)}
    trace(model, make_prompt_cache(model))
    assert calls == {kind: kind.__call__ for kind in calls}
