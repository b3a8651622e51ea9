"""Linear layers of mixers: one product for all blocks, none for a replay."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.worker import families
from worker.cache.layout import Segment
from worker.cache.projections import RecalledPass, SharedPass, during, open_layers
from worker.target import Target


class Mixer(nn.Module):
    """Two layers, of which the first is given the argument itself and the second makes what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def __call__(self, x: mx.array) -> mx.array:
        return self.last(self.first(x) + 1)


def opened() -> tuple[Mixer, list[tuple[int, ...]]]:
    """A mixer, and the shapes that its layers are really given."""
    shapes: list[tuple[int, ...]] = []
    mixer = Mixer()
    layer = mixer.first

    class Watched(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            shapes.append(x.shape)
            return super().__call__(x)

    layer.__class__ = Watched
    return mixer, shapes


def test_blocks_share_products_of_the_packed_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, shapes = opened()
    monkeypatch.setattr(nn, "Linear", type(mixer.first))
    mixer.last.__class__ = type(mixer.first)
    open_layers(mixer)
    packed, shared = mx.random.normal((3, 1, 4)), SharedPass()
    outputs = []
    with during(shared):
        for block in (slice(0, 2), slice(2, 3)):
            part = packed[block].reshape(1, -1, 4)
            shared.begin([(part, packed)], lambda whole, block=block: whole[block].reshape(1, -1, 4))
            outputs.append(mixer(part))
    assert shapes == [(3, 1, 4), (1, 2, 4), (1, 1, 4)]  # the first layer once; the last one's products are not computed
    found = shared.last_layer(outputs)
    assert found is not None
    layer, given = found
    joined = layer(mx.concatenate(given, axis=1).reshape(3, 1, 4))
    assert mx.allclose(joined, mixer(packed))


def test_replay_takes_the_products_of_the_step() -> None:
    mixer = Mixer()
    open_layers(mixer)
    x, shared = mx.random.normal((2, 3, 4)), SharedPass()
    with during(shared):
        products = shared.begin([], lambda whole: whole)
        expected = mixer(x)
    with during(RecalledPass(products, lambda whole: whole[1:, :2])):
        assert mx.array_equal(mixer(mx.full((1, 2, 4), mx.nan)), expected[1:, :2])


@pytest.mark.parametrize("kind", ["mamba2", "deepseek_v3"])
def test_each_weight_is_read_once_a_step_whatever_the_widths(kind: str) -> None:
    target = Target(families.make_model(kind))
    mx.eval(target.forward([Segment(row, 0, 6) for row in range(3)], [1] * 18, [0]), target.cached_arrays())
    for row in range(3):
        target.state.commit(row, 6)
    layer = next(m for name, m in target.model.named_modules() if name.endswith(("in_proj", "kv_a_proj_with_mqa")))
    calls = []
    base = type(layer).__mro__[1]
    real = base.__call__

    def counted(self: nn.Module, x: mx.array) -> mx.array:
        calls.extend([x.shape] if self is layer else [])
        return real(self, x)

    base.__call__ = counted
    try:
        target.forward([Segment(0, 6, 1, True), Segment(1, 6, 3), Segment(2, 6, 5, True)], [1] * 9, [0])
    finally:
        base.__call__ = real
    assert calls == [(9, 1, 32)]
