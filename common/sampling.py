"""How a request wants its tokens chosen: sampling parameters, speculation options and their ranges."""

import math
from collections.abc import Sequence

import msgspec

from common.errors import InvalidValue

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_DRAFT_TOKENS = 32
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
DRAFTERS = (
    "auto",
    "combo",
    "suffix",
    "ngram",
    "model",
    "layers",
    "head",
    "none",
)  # `auto` and `combo` choose among a model's own


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one request's sampling. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `logit_bias` has pairs of a token id and what is added to its logit. `repetition_penalty` (1 is off) divides the
    positive logits of tokens that occur in prompt or output, and multiplies the negative ones; `presence_penalty` and
    `frequency_penalty` (0 is off) are taken from the logits of output tokens, once or once for each occurrence.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether a token's chance depends on how often it occurred."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before the temperature divides them."""
        return bool(self.logit_bias) or self.counts_tokens


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """Which drafter may propose tokens for a request, and how many a step at most (None: the controller's limit)."""

    drafter: str = "auto"
    max_draft_tokens: int | None = None

    @property
    def is_on(self) -> bool:
        return self.drafter != "none" and self.max_draft_tokens != 0


def check_sampling(sampling: Sampling) -> None:
    """Raise `InvalidValue` naming the first parameter that is out of range."""
    _check_range("temperature", sampling.temperature, 0.0, 2.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0, low_open=True)
    _check_range("top_k", sampling.top_k, 0, 1_000_000)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("seed", sampling.seed, 0, MAX_SEED)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.01, 10.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check_logit_bias(sampling.logit_bias)


def check_vocabulary(sampling: Sampling, vocabulary: int) -> None:
    """Raise `InvalidValue` for a biased token that a model of so many tokens does not have."""
    for token, _ in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidValue(
                f"logit_bias names token {token}; this model's ids lie in [0, {vocabulary - 1}]", param="logit_bias"
            )


def check_logprobs(name: str, count: int) -> None:
    """Raise `InvalidValue` unless so many alternatives can be told for each token."""
    _check_range(name, count, 0, MAX_TOP_LOGPROBS)


def check_speculation(speculation: Speculation) -> None:
    """Raise `InvalidValue` for an unknown drafter or an impossible draft length."""
    if speculation.drafter not in DRAFTERS:
        raise InvalidValue(
            f"speculative.drafter is {speculation.drafter!r}; known drafters: {', '.join(DRAFTERS)}",
            param="speculative.drafter",
        )
    if speculation.max_draft_tokens is not None:
        _check_range("speculative.max_draft_tokens", speculation.max_draft_tokens, 0, MAX_DRAFT_TOKENS)


def check_drafter(speculation: Speculation, available: Sequence[str]) -> None:
    """Raise `InvalidValue` for a drafter that the model does not have."""
    name = speculation.drafter
    if speculation.is_on and name not in ("auto", "combo", *available):
        raise InvalidValue(
            f"speculative.drafter is {name!r}, which this model does not have; it has: {', '.join(available)} "
            "(draft_model and draft_layers_ratio in the configuration add others)",
            param="speculative.drafter",
        )


def check_stop(stop: tuple[str, ...]) -> None:
    """Raise `InvalidValue` for too many, too long or empty stop strings."""
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidValue(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop")
    for text in stop:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidValue(
                f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed", param="stop"
            )


def _check_logit_bias(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidValue(
            f"logit_bias has {len(biases)} tokens; at most {MAX_LOGIT_BIASES} are allowed", param="logit_bias"
        )
    for token, bias in biases:
        if not (math.isfinite(bias) and -100.0 <= bias <= 100.0):
            raise InvalidValue(
                f"logit_bias of token {token} is {bias}; it must lie in [-100.0, 100.0]", param="logit_bias"
            )


def _check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    is_inside = math.isfinite(value) and low <= value <= high and not (low_open and value == low)
    if not is_inside:
        bracket = "(" if low_open else "["
        raise InvalidValue(f"{name} is {value}; it must lie in {bracket}{low}, {high}]", param=name)
