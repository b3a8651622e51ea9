"""Sampling as it is written in the papers, one token at a time in plain Python: what the sampler has to equal."""

import itertools
import math
from collections.abc import Callable, Sequence

from common.sampling import Sampling


def adjusted(logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Logits after the biases, then the repetition penalty, then the presence and frequency penalties."""
    values = list(logits)
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in {*prompt, *output} if sampling.repetition_penalty != 1.0 else ():
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(output):
        values[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    return values


def chances(logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """Each token's probability to be the next one."""
    values = adjusted(logits, sampling, prompt, output)
    if sampling.is_greedy:
        return [float(token == values.index(max(values))) for token in range(len(values))]
    weights = [math.exp((value - max(values)) / sampling.temperature) for value in values]
    best = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = best[: sampling.top_k or len(best)]
    kept = [token for token in kept if weights[token] >= sampling.min_p]
    inside = sum(weights[token] for token in kept)
    nucleus = list(
        itertools.takewhile(lambda n: sum(weights[t] for t in kept[:n]) < sampling.top_p * inside, range(99))
    )
    kept = kept[: len(nucleus)] if sampling.top_p < 1.0 else kept
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def sequences(
    next_logits: Callable[[Sequence[int]], Sequence[float]], sampling: Sampling, prompt: Sequence[int], length: int
) -> dict[tuple[int, ...], float]:
    """Every output of this length with its probability; `next_logits` is a function of prompt and output."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        found = {
            (*output, token): chance * more
            for output, chance in found.items()
            for token, more in enumerate(chances(next_logits([*prompt, *output]), sampling, prompt, output))
            if more > 0
        }
    return found
