"""Reading chosen layers of a model during its forward."""

import mlx.core as mx
import pytest

from tests.worker import tiny
from worker.cache.layout import Segment
from worker.taps import NoLayers, Taps
from worker.target import Target

TOKENS = [5, 9, 2, 7, 7, 1]


def test_taps_hold_the_outputs_of_their_layers_in_order() -> None:
    model = tiny.make_model("llama")
    hidden, outputs = model.model.embed_tokens(mx.array([TOKENS])), []
    for layer in model.model.layers:
        hidden = layer(hidden, "causal", None)
        outputs.append(hidden)
    taps = Taps(model, (2, 0))
    plain = model(mx.array([TOKENS]))
    told = taps.take()
    assert taps.layers == (0, 2)
    assert mx.allclose(told[0], outputs[0], atol=1e-5) and mx.allclose(told[1], outputs[2], atol=1e-5)
    taps.remove()
    assert mx.array_equal(model(mx.array([TOKENS])), plain)
    with pytest.raises(NoLayers, match="put out no hidden states"):
        taps.take()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_packed_step_tells_what_a_batch_tells(kind: str) -> None:
    model = tiny.make_model(kind)
    taps = Taps(model, (0, 1))
    model(mx.array([TOKENS]))
    expected = taps.take()
    target = Target(model)
    mx.eval(target.forward([Segment(0, 0, len(TOKENS))], TOKENS, [0]))
    for told, one in zip(taps.take(), expected, strict=True):
        assert told.shape[:2] == (len(TOKENS), 1)
        assert mx.allclose(told[:, 0], one[0], atol=1e-4)


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(NoLayers, match=r"layers \[3\] are asked for; this model has 3"):
        Taps(tiny.make_model("llama"), (0, 3))
