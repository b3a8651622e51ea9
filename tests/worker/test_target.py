"""The ragged cache in mlx-lm's model classes: the model's own logits, whatever was rolled back before."""

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import mamba2
from mlx_lm.models.cache import make_prompt_cache

from tests.worker import tiny
from worker import self_test
from worker.cache.layout import Segment
from worker.cache.ragged import UnsupportedCache
from worker.target import Target


def own_logits(model: Any, prompts: list[list[int]]) -> list[mx.array]:
    return [model(mx.array([prompt]), cache=make_prompt_cache(model))[0] for prompt in prompts]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_and_rollbacks_give_the_models_own_logits(kind: str, seed: int) -> None:
    model = tiny.make_model(kind)
    source = random.Random(seed)
    prompts = [[source.randrange(tiny.VOCABULARY) for _ in range(n)] for n in (1, 40, 17, 75)]
    expected = own_logits(model, prompts)
    target, kept, checked = Target(model), [0] * len(prompts), 0
    while any(kept[row] < len(prompts[row]) for row in range(len(prompts))):
        spans = [(row, kept[row], min(source.randrange(9), len(prompts[row]) - kept[row])) for row in range(4)]
        segments = [Segment(row, start, width) for row, start, width in spans if width]
        if not segments:
            continue
        places = [(s.slot, s.start + i) for s in segments for i in range(s.width)]
        chosen = sorted(source.sample(range(len(places)), source.randrange(1, len(places) + 1)))
        logits = target.forward(segments, [prompts[row][at] for row, at in places], chosen)
        for got, place in zip(logits, chosen, strict=True):
            row, at = places[place]
            assert mx.allclose(got, expected[row][at], atol=1e-4, rtol=1e-4)
            checked += 1
        mx.eval(target.cached_arrays())
        for segment in segments:
            kept[segment.slot] = segment.start + source.randrange(segment.width + 1)
            target.state.commit(segment.slot, kept[segment.slot])
    assert checked > 20


def test_capacity_grows_and_keeps_what_was_written() -> None:
    model = tiny.make_model("llama")
    prompt = [i % tiny.VOCABULARY for i in range(700)]
    target, expected = Target(model), own_logits(model, [prompt])[0]
    for start in range(0, 700, 140):
        logits = target.forward([Segment(0, start, 140)], prompt[start : start + 140], [139])
        mx.eval(logits, target.cached_arrays())
        target.state.commit(0, start + 140)
    assert target.state.capacity_tokens >= 700
    assert mx.allclose(logits[0], expected[-1], atol=1e-3)


def test_self_test_accepts_a_model_that_works() -> None:
    model = tiny.make_model("gemma3")
    reference = self_test.reference_logits(model)
    self_test.check(Target(model), reference)


def test_self_test_refuses_a_model_whose_logits_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    reference = self_test.reference_logits(model)
    target = Target(model)
    # Every query sees all of its slot.
    monkeypatch.setattr(
        "worker.cache.ragged.Step.mask",
        lambda _, group, window, repeats: mx.ones((group.slots, 1, repeats * group.width, group.extent), mx.bool_),
    )
    with pytest.raises(self_test.WrongLogits, match="off by"):
        self_test.check(target, reference)


def test_a_recurrent_model_is_refused_by_the_name_of_its_cache() -> None:
    arguments = mamba2.ModelArgs.from_dict(
        {
            "model_type": "mamba2",
            "num_heads": 4,
            "head_dim": 8,
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "state_size": 8,
            "num_hidden_layers": 1,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": True,
            "time_step_limit": (0.0, 1.0),
            "time_step_rank": 4,
            "ssm_state_size": 8,
        }
    )
    with pytest.raises(UnsupportedCache, match="ArraysCache"):
        Target(mamba2.Model(arguments))
