"""The outputs of speculative decoding follow the target's distribution, whoever drafts, and these tests could fail.

A toy target whose next logits depend on the last token, thousands of seeds, and every possible output's probability
from the reference: as vLLM tests its rejection sampler, but for whole outputs at once.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import msgspec
import pytest

from common.sampling import Sampling
from tests.worker import reference
from worker import acceptance
from worker.acceptance import Verdict
from worker.request import Request, Row
from worker.sampling import noise as noise_of_draws
from worker.sampling.sampler import Draw, choose

VOCABULARY = 4
LENGTH = 4
PROMPT = (1, 2, 2)
OUTPUTS = 3000
SIGNIFICANT = 3.7  # standard deviations: one in ten thousand right samplers would fail
TABLE = [[random.Random(10 * i + j).uniform(-1.5, 1.5) for j in range(VOCABULARY)] for i in range(VOCABULARY)]

SAMPLINGS = {
    "softmax": Sampling(temperature=1.0),
    "filtered": Sampling(temperature=0.8, top_p=0.85, min_p=0.05),
    "penalized": Sampling(
        temperature=1.2,
        repetition_penalty=1.6,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias=((0, 0.8), (3, -0.6)),
    ),
    "rewarded": Sampling(temperature=1.0, top_k=3, repetition_penalty=0.7, frequency_penalty=-0.6),
}

Drafter = Callable[[Row], Sequence[int]]


# --- drafters, from the best to the worst -----------------------------------------------------------------


def nothing(row: Row) -> Sequence[int]:
    return ()


def right(row: Row) -> Sequence[int]:
    """What plain decoding gave for this seed."""
    return plain_outputs(unseeded(row))[row.request.sampling.seed][row.output_tokens :]


def wrong(row: Row) -> Sequence[int]:
    """Never what plain decoding gave."""
    return [(token + 1) % VOCABULARY for token in right(row)]


def noise(row: Row) -> Sequence[int]:
    source = random.Random(f"{row.request.sampling.seed} {len(row.tokens)}")
    return source.choices(range(VOCABULARY), k=LENGTH)


def likely(row: Row) -> Sequence[int]:
    """Always the target's likeliest next token."""
    return chain(row, max)


def anti_target(row: Row) -> Sequence[int]:
    """Always its unlikeliest."""
    return chain(row, min)


def chain(row: Row, pick: Callable[..., int]) -> Sequence[int]:
    draft = [row.tokens[-1]]
    for _ in range(LENGTH):
        draft.append(pick(range(VOCABULARY), key=TABLE[draft[-1]].__getitem__))
    return draft[1:]


DRAFTERS: tuple[Drafter, ...] = (nothing, right, wrong, noise, likely, anti_target)


# --- decoding ---------------------------------------------------------------------------------------------


def outputs(sampling: Sampling, drafter: Drafter) -> list[tuple[int, ...]]:
    """The outputs of all seeds, decoded in one batch with the engine's own parts."""
    requests = [
        Request(str(seed), PROMPT, msgspec.structs.replace(sampling, seed=seed), LENGTH) for seed in range(OUTPUTS)
    ]
    rows = [Row.of(request, slot, 0.0) for slot, request in enumerate(requests)]
    while live := [row for row in rows if row.tokens_left > 0]:
        step(live, [tuple(drafter(row)[: row.tokens_left - 1]) for row in live])
    return [tuple(row.tokens[len(PROMPT) :]) for row in rows]


def step(rows: Sequence[Row], drafts: Sequence[tuple[int, ...]]) -> None:
    draws = [row.draws(draft) for row, draft in zip(rows, drafts, strict=True)]
    last = [token for row, draft in zip(rows, drafts, strict=True) for token in (row.tokens[-1], *draft)]
    logits = mx.array(TABLE)[mx.array(last)]
    own = iter(choose(logits, list(itertools.chain(*draws))).tolist())  # type: ignore[arg-type]
    for row, draft, of_row in zip(rows, drafts, draws, strict=True):
        chosen = [next(own) for _ in of_row]
        row.tokens += acceptance.accept(draft, chosen, row.tokens_left, ()).tokens


@cache
def plain_outputs(sampling: Sampling) -> list[tuple[int, ...]]:
    return outputs(sampling, nothing)


def unseeded(row: Row) -> Sampling:
    return msgspec.structs.replace(row.request.sampling, seed=0)


# --- statistics ---------------------------------------------------------------------------------------------


@cache
def chances(sampling: Sampling) -> dict[tuple[int, ...], float]:
    return reference.sequences(lambda tokens: TABLE[tokens[-1]], sampling, PROMPT, LENGTH)


def deviation(found: Sequence[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square in standard deviations of a normal variable (Wilson and Hilferty, 1931).

    Outcomes that are too rare for the approximation are taken together.
    """
    counts = Counter(found)
    assert set(counts) <= set(expected), "an outcome that has no probability"
    often = [outcome for outcome, chance in expected.items() if chance * len(found) >= 8]
    cells = [(counts[outcome], expected[outcome] * len(found)) for outcome in often]
    rest = len(found) - sum(count for count, _ in cells), len(found) - sum(wanted for _, wanted in cells)
    cells += [rest] if rest[1] >= 8 else []
    square = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    freedom = len(cells) - 1
    spread = 2 / (9 * freedom)
    return float(((square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def at(position: int, expected: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """The distribution of the token at one position."""
    marginal: dict[tuple[int, ...], float] = {}
    for outcome, chance in expected.items():
        marginal[(outcome[position],)] = marginal.get((outcome[position],), 0.0) + chance
    return marginal


def worst_deviation(found: Sequence[tuple[int, ...]], sampling: Sampling) -> float:
    """Of whole outputs, and of the tokens at each position."""
    expected = chances(sampling)
    each = [deviation([(output[i],) for output in found], at(i, expected)) for i in range(LENGTH)]
    return max(deviation(found, expected), *each)


# --- tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda drafter: drafter.__name__)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_outputs_follow_the_targets_distribution(name: str, drafter: Drafter) -> None:
    found = outputs(SAMPLINGS[name], drafter)
    assert worst_deviation(found, SAMPLINGS[name]) < SIGNIFICANT
    assert found == plain_outputs(SAMPLINGS[name])


def test_the_reference_gives_probabilities() -> None:
    for sampling in SAMPLINGS.values():
        assert sum(chances(sampling).values()) == pytest.approx(1.0)
    assert len(chances(SAMPLINGS["softmax"])) == VOCABULARY**LENGTH


def accept_anything(draft: Sequence[int], own: Sequence[int], tokens_left: int, end_tokens: object) -> Verdict:
    return Verdict((*draft, own[-1])[:tokens_left], len(draft), None)


def believe_the_first(draft: Sequence[int], own: Sequence[int], tokens_left: int, end_tokens: object) -> Verdict:
    """The first draft token stands unseen."""
    rest = acceptance_rule(draft[1:], own[1:], tokens_left, ()) if draft else acceptance_rule((), own, tokens_left, ())
    return Verdict((*draft[:1], *rest.tokens)[:tokens_left], 0, None)


def bonus_after_a_fault(draft: Sequence[int], own: Sequence[int], tokens_left: int, end_tokens: object) -> Verdict:
    """The choice that follows a wrong draft token stays."""
    verdict = acceptance_rule(draft, own, tokens_left, ())
    return Verdict((*verdict.tokens, *own[len(verdict.tokens) :])[:tokens_left], 0, None)


acceptance_rule = acceptance.accept


@pytest.mark.parametrize("broken", [accept_anything, believe_the_first, bonus_after_a_fault])
@pytest.mark.parametrize("drafter", [noise, likely, anti_target], ids=lambda drafter: drafter.__name__)
def test_a_broken_acceptance_rule_is_caught(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Verdict], drafter: Drafter
) -> None:
    monkeypatch.setattr(acceptance, "accept", broken)
    assert worst_deviation(outputs(SAMPLINGS["softmax"], drafter), SAMPLINGS["softmax"]) > 2 * SIGNIFICANT


@pytest.mark.parametrize(
    "key",
    [
        lambda seed, position: (seed, 7),
        lambda seed, position: (7, position),
        lambda seed, position: (seed, position // 2),
    ],
    ids=["no position", "no seed", "every other position"],
)
def test_noise_that_forgets_something_is_caught(
    monkeypatch: pytest.MonkeyPatch, key: Callable[[int, int], tuple[int, int]]
) -> None:
    monkeypatch.setattr(noise_of_draws, "noise_key", key)
    assert worst_deviation(outputs(SAMPLINGS["softmax"], nothing), SAMPLINGS["softmax"]) > 2 * SIGNIFICANT


def test_penalties_that_do_not_count_the_draft_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_outputs(SAMPLINGS["penalized"])  # what the drafter goes by is right
    draws = Row.draws

    def forgetful(row: Row, draft: Sequence[int]) -> list[Draw]:
        return [Draw(draw.sampling, draw.position, draw.tally) for draw in draws(row, draft)]

    monkeypatch.setattr(Row, "draws", forgetful)
    assert worst_deviation(outputs(SAMPLINGS["penalized"], right), SAMPLINGS["penalized"]) > 2 * SIGNIFICANT


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"repetition_penalty": 1.0},
        {"presence_penalty": 0.0},
        {"frequency_penalty": 0.0},
        {"logit_bias": ()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_parameter_without_effect_is_caught(changes: dict[str, object]) -> None:
    asked = SAMPLINGS["penalized"]
    assert worst_deviation(outputs(msgspec.structs.replace(asked, **changes), nothing), asked) > SIGNIFICANT
