"""A head unrolled over a text does what a chain of drafts does at each of its positions."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from tests.worker.training import language
from worker.heads.head import Head
from worker.training.acceptance import Counts, walk
from worker.training.muon import orthogonal
from worker.training.plan import Plan, fresh_head, head_config
from worker.training.unroll import unroll


def fresh() -> tuple[Any, Head]:
    model = language.untrained()
    config = head_config(model, language.CONFIG, Plan())
    return model, fresh_head(model, config, np.arange(40, dtype=np.int32), seed=0)


def test_each_pass_gives_what_a_chain_on_a_cache_gives() -> None:
    _, head = fresh()
    mx.random.seed(2)
    features, tokens = mx.random.normal((1, 9, 64)), mx.array([[4, 8, 15, 16, 23, 30, 31, 7, 3]])
    embedded = head.embed(tokens)
    passes = unroll(head, features, embedded, 4)
    for start in (0, 3, 5):
        caches = [KVCache()]
        hidden = head(features[:, : start + 1], embedded[:, : start + 1], caches, "causal")[:, -1:]
        for number in range(4):
            assert mx.allclose(passes[number][:, start + number], hidden[:, 0], atol=1e-4)
            if number < 3:
                at = start + number + 1
                hidden = head(hidden, embedded[:, at : at + 1], caches)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_orthogonal_brings_all_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = np.linalg.svd(np.array(orthogonal(mx.random.normal(shape, key=mx.random.key(1)))), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_walk_counts_drafts_until_the_first_wrong_one() -> None:
    right = np.zeros((3, 12), dtype=bool)
    right[0, 1] = right[1, 2] = True  # at the first step two drafts stand, then none
    steps = walk(right, list(range(12)), start=2, end=12, length=3)
    assert steps == [2, 0, 0, 0, 0]
    assert Counts(3, steps).accept_length == 1.4
    assert Counts(3, steps).by_position == [0.2, 1.0, 0.0]


def test_a_walk_copies_what_followed_a_match_of_three() -> None:
    right = np.zeros((3, 12), dtype=bool)
    assert walk(right, [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6], start=5, end=12, length=3, copied=3) == [0, 0, 3]


def test_copies_may_be_longer_than_drafts() -> None:
    right = np.zeros((3, 20), dtype=bool)
    right[0, 8] = right[1, 9] = True  # after a match of two tokens, which is not copied, two drafts of the head stand
    row = [*range(5, 13), 5, 6, *range(7, 13), 5, 6, 7, 8]
    assert walk(right, row, start=8, end=20, length=3, copied=4) == [0, 2, 4]
    assert walk(right, row, start=8, end=20, length=3) == [0, 2, 0, 0, 0, 0, 0]
