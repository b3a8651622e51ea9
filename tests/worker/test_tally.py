"""Biases and penalties: what they do to logits, counted token by token, with or without a draft in between."""

import random
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sampling import Sampling
from tests.worker import reference
from worker.sampling.tally import Tally, adjusted

VOCABULARY = 12
SOURCE = random.Random(5)
LOGITS = [SOURCE.uniform(-4, 4) for _ in range(VOCABULARY)]
PROMPT = [3, 3, 7, 0, 11]
OUTPUT = [7, 1, 1, 1, 5]

SAMPLINGS = {
    "bias": Sampling(logit_bias=((2, 1.5), (7, -100.0), (3, 0.25))),
    "repetition": Sampling(repetition_penalty=1.3),
    "repetition rewarded": Sampling(repetition_penalty=0.5),
    "presence": Sampling(presence_penalty=0.7),
    "frequency": Sampling(frequency_penalty=-0.4),
    "output penalties": Sampling(presence_penalty=-1.1, frequency_penalty=0.3),
    "all": Sampling(
        repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((1, 3.0), (4, -2.5), (9, 6.0))
    ),
}


def tally_of(sampling: Sampling, prompt: list[int], output: list[int]) -> Tally:
    tally = Tally.of(sampling, len(prompt))
    assert tally is not None
    tally.extend([*prompt, *output])
    return tally


def values(sampling: Sampling, prompt: list[int], output: list[int], draft: tuple[int, ...] = ()) -> list[float]:
    changed: list[list[float]] = adjusted(mx.array([LOGITS]), [(tally_of(sampling, prompt, output), draft)]).tolist()  # type: ignore[assignment]
    return changed[0]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("output", [[], OUTPUT])
def test_changed_logits_are_those_of_the_formulas(name: str, output: list[int]) -> None:
    expected = reference.adjusted(LOGITS, SAMPLINGS[name], PROMPT, output)
    assert values(SAMPLINGS[name], PROMPT, output) == pytest.approx(expected, abs=1e-5)


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    token = 1
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((token, 8.0),)
    )
    expected = (LOGITS[token] + 8.0) / 2.0 - 0.5 - 3 * 0.25
    assert values(sampling, PROMPT, OUTPUT)[token] == pytest.approx(expected)


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    sampling = Sampling(presence_penalty=1.0, frequency_penalty=1.0)
    assert values(sampling, PROMPT, []) == pytest.approx(LOGITS)


def test_a_bias_counts_no_tokens() -> None:
    assert len(tally_of(SAMPLINGS["bias"], PROMPT, OUTPUT).ids) == 3


def test_requests_without_biases_and_penalties_have_no_tally_and_their_logits_stay() -> None:
    assert Tally.of(Sampling(temperature=1.0, top_p=0.5), 3) is None
    logits = mx.array([LOGITS, LOGITS], dtype=mx.float16)
    assert adjusted(logits, [(None, ()), (None, ())]) is logits


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.21, 3.0]),
    presence_penalty=st.sampled_from([0.0, -1.3, 0.77]),
    frequency_penalty=st.sampled_from([0.0, 0.1, -2.0]),
    logit_bias=st.sampled_from([(), ((4, 0.3),), ((0, -7.7), (11, 100.0))]),
).filter(lambda sampling: sampling.changes_logits)


@settings(deadline=None)
@given(samplings, tokens, tokens, tokens)
def test_a_draft_counts_as_if_it_were_committed_and_leaves_no_trace(
    sampling: Sampling, prompt: list[int], output: list[int], draft: list[int]
) -> None:
    """Bit for bit."""
    committed = values(sampling, prompt, output + draft)
    assert values(sampling, prompt, output, tuple(draft)) == committed
    used = tally_of(sampling, prompt, output)
    adjusted(mx.array([LOGITS]), [(used, draft)])
    before: Any = adjusted(mx.array([LOGITS]), [(used, ())]).tolist()
    assert before[0] == values(sampling, prompt, output)
    used.extend(prompt + output + draft)
    after: Any = adjusted(mx.array([LOGITS]), [(used, ())]).tolist()
    assert after[0] == committed


def test_neighbours_change_nothing() -> None:
    """Bit for bit, in any company; whoever has no tally keeps its logits."""
    source = random.Random(1)
    rows: list[tuple[Tally | None, tuple[int, ...]]] = [
        (tally_of(sampling, PROMPT, OUTPUT), tuple(source.choices(range(VOCABULARY), k=source.randrange(4))))
        for sampling in SAMPLINGS.values()
    ]
    rows.insert(2, (None, ()))
    logits = mx.array([[source.uniform(-4, 4) for _ in range(VOCABULARY)] for _ in rows])
    together = adjusted(logits, rows)
    for i, row in enumerate(rows):
        assert together[i].tolist() == adjusted(logits[i : i + 1], [row])[0].tolist()
    assert together[2].tolist() == logits[2].tolist()


def test_a_step_looks_at_distinct_tokens_not_at_the_whole_context() -> None:
    tally = tally_of(SAMPLINGS["repetition"], [1, 2] * 5000, [3] * 1000)
    assert len(tally.ids) == 3
    tokens = [1, 2] * 5000 + [3] * 1000
    tally.extend(tokens)
    assert (tally.counted, list(tally.seen)) == (11000, [5000, 5000, 1000])
