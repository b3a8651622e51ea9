"""Tiny models with random weights of several architectures, and engines around them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_map_with_path
from mlx_lm.models import gemma3_text, llama, qwen3

from common.sampling import Sampling, Speculation
from worker.drafters.drafter import CopyingDrafter, Draft, Drafter, Offer
from worker.drafters.head import HeadDrafter
from worker.drafters.layers import HealedLayersDrafter, LayersDrafter
from worker.drafters.model import ModelDrafter
from worker.drafters.ngram import NgramDrafter
from worker.drafting import PLAIN_EVERY, Drafting
from worker.engine import Engine, Pace
from worker.heads.head import Head, HeadConfig
from worker.heads.healed import HealedConfig, HealedLayers
from worker.heads.vocabulary import embedding
from worker.prefix_cache import PrefixCache
from worker.request import Request, Row
from worker.scheduler import Limits
from worker.step_times import GRID, StepTimes
from worker.taps import owner_of_layers
from worker.target import Target
from worker.time_factors import Kind

VOCABULARY = 96


def make_model(kind: str, seed: int = 0) -> Any:
    """A random model of `kind`: llama, qwen3 or gemma3 (sliding windows of 16 tokens)."""
    return randomized(_BUILDERS[kind](), seed)


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with random weights."""
    mx.random.seed(seed)
    # Larger than usual weights, so that the next token depends on all of the context.
    model.update(tree_map_with_path(lambda name, a: mx.random.normal(a.shape) * _scale(name, a), model.parameters()))
    mx.eval(model.parameters())
    return model


def _scale(name: str, array: mx.array) -> float:
    return 0.5 if array.ndim == 1 or "embed" in name else 1.5 / array.shape[-1] ** 0.5


def _llama() -> Any:
    return llama_model()


def llama_model(hidden_size: int = 48, heads: int = 6) -> Any:
    """A llama of three layers whose weights are still to be set."""
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden_size,
            num_hidden_layers=3,
            intermediate_size=64,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
        )
    )


def _qwen3() -> Any:
    return qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            rope_theta=10000.0,
            head_dim=8,
            tie_word_embeddings=False,
        )
    )


def _gemma3() -> Any:
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            hidden_size=32,
            num_hidden_layers=4,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=VOCABULARY,
            sliding_window=16,
            sliding_window_pattern=2,
        )
    )


_BUILDERS: dict[str, Callable[[], Any]] = {"llama": _llama, "qwen3": _qwen3, "gemma3": _gemma3}
KINDS = tuple(_BUILDERS)


class Oracle(CopyingDrafter):
    """Drafts from what plain decoding gave, with a share of its tokens changed: 0 is always right, 1 always wrong."""

    name = "oracle"

    def __init__(self, outputs: dict[tuple[int, ...], list[int]], wrong: float, seed: int = 0) -> None:
        self.outputs = outputs
        self.wrong = wrong
        self.random = random.Random(seed)

    def offer(self, row: Row, limit: int) -> Offer | None:
        for prompt, output in self.outputs.items():
            made = len(row.tokens) - len(prompt)
            if made >= 0 and row.tokens == [*prompt, *output[:made]]:
                tokens = tuple(self._spoil(t) for t in output[made : made + limit])
                return Offer(self.name, len(tokens), 5, tokens)
        return None

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """Nothing is kept."""

    def _spoil(self, token: int) -> int:
        return (token + 1) % VOCABULARY if self.random.random() < self.wrong else token


class Noise(CopyingDrafter):
    """Drafts random tokens."""

    name = "noise"

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def offer(self, row: Row, limit: int) -> Offer | None:
        return Offer(self.name, limit, 3, tuple(self.random.randrange(VOCABULARY) for _ in range(limit)))

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """Nothing is kept."""


class FixedTimes(StepTimes):
    """For tests that count drafts: what steps really take decides nothing."""

    def observe(self, tokens: int, seconds: float, kind: Kind = Kind.PLAIN, draft_s: float = 0.0) -> None:
        """Learn nothing."""


def flat_times() -> StepTimes:
    """A device on which verification is free: every draft is worth a try."""
    return FixedTimes([0.01 + 1e-9 * i for i in range(len(GRID))])


class UnmeasuredDrafting(Drafting):
    """For tests that count drafts: what looking for them really takes decides nothing."""

    def drafts(self, rows: Sequence[Row], times: StepTimes, beside: int = 0) -> tuple[list[Draft], float]:
        self.clock, self.plain_every = lambda: 0.0, PLAIN_EVERY
        return super().drafts(rows, times, beside)


def make_engine(
    model: Any,
    drafter: Drafter | Callable[[Target], Drafter] | None = None,
    rows: int = 8,
    chunk_tokens: int | None = None,
    prefix_bytes: int = 0,
    kv_bits: int = 0,
) -> Engine:
    """An engine around `model` whose rows all draft with one drafter (n-gram where none is given), made of its target.

    `chunk_tokens` bounds a prompt's chunks by giving steps that price. It keeps no prefixes unless `prefix_bytes` says
    how many bytes of them.
    """
    times = flat_times() if chunk_tokens is None else StepTimes([0.1 * n / chunk_tokens for n in GRID])
    target = Target(model, kv_bits)
    limits = Limits(rows=rows, waiting=1000, kv_bytes=None, kv_bytes_per_token=1)
    chosen = drafter(target) if callable(drafter) else drafter or NgramDrafter(5)
    drafting = UnmeasuredDrafting({chosen.name: chosen}, in_auto=(chosen.name,))
    return Engine(target, times, limits, drafting, Pace(), prefixes=PrefixCache(prefix_bytes))


def model_drafter(draft_model: Any) -> Callable[[Target], Drafter]:
    """Makes a `model` drafter whose drafting steps cost nothing to speak of."""
    return lambda target: ModelDrafter(Target(draft_model), cheap_times(), VOCABULARY)


def layers_drafter(kept: Sequence[int]) -> Callable[[Target], Drafter]:
    """Makes a `layers` drafter of these layers."""
    return lambda target: LayersDrafter(target, cheap_times(), kept)


def healed_drafter(model: Any, kept: Sequence[int] = (0, 1)) -> Callable[[Target], Drafter]:
    """Makes a `layers` drafter of these layers, with random adapters."""
    return lambda _: HealedLayersDrafter(make_healed(model, kept), cheap_times(), VOCABULARY)


def make_healed(model: Any, kept: Sequence[int] = (0, 1), target: str = "one") -> HealedLayers:
    """Some of the model's layers, with random adapters."""
    mx.random.seed(2)
    config = HealedConfig(target=target, kept=tuple(kept), rank=4)
    healed = HealedLayers(config, mx.arange(VOCABULARY), model)
    healed.update(tree_map(lambda array: 0.2 * mx.random.normal(array.shape), healed.trainable_parameters()))
    mx.eval(healed.parameters())
    return healed


def head_drafter(model: Any, seed: int = 3) -> Callable[[Target], Drafter]:
    """Makes a `head` drafter of a random head for this model, which predicts two thirds of its vocabulary."""
    return lambda target: HeadDrafter(target, make_head(model, seed), cheap_times(), VOCABULARY)


def make_head(model: Any, seed: int = 3) -> Head:
    """A random head bound to the model, which taps its first and last layer."""
    config = HeadConfig(
        target="",
        taps=(0, len(owner_of_layers(model)["layers"]) - 1),
        hidden_size=embedding(model).weight.shape[1],
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_size=40,
    )
    return randomized(Head(config, mx.arange(0, VOCABULARY * 2 // 3)), seed).bind(model)


def cheap_times() -> StepTimes:
    return StepTimes([1e-6 + 1e-9 * i for i in range(len(GRID))])


def make_request(number: int, seed: int = 0, **changes: Any) -> Request:
    """Request `number` of a set: its prompt and length are functions of it."""
    source = random.Random(1000 * seed + number)
    phrase = [source.randrange(VOCABULARY) for _ in range(source.randrange(2, 7))]
    prompt = tuple((phrase * 12)[: source.randrange(1, 60)])
    wanted: dict[str, Any] = {"request_id": f"r{number}", "prompt": prompt, "max_tokens": source.randrange(1, 30)}
    return Request(**(wanted | {"sampling": Sampling()} | changes))


def plain(request: Request) -> Request:
    """The same request, decoded without speculation."""
    return Request(
        request_id=request.request_id,
        prompt=request.prompt,
        sampling=request.sampling,
        max_tokens=request.max_tokens,
        end_tokens=request.end_tokens,
        speculation=Speculation(drafter="none"),
    )


def finish(engine: Engine, requests: Sequence[Request], join: random.Random | None = None) -> dict[str, list[int]]:
    """Run requests to their end, all at once or joining at random steps; returns each one's output tokens."""
    outputs: dict[str, list[int]] = {request.request_id: list(request.resume) for request in requests}
    queue = list(requests)
    while queue or engine.has_work:
        while queue and (join is None or join.random() < 0.3 or not engine.has_work):
            engine.submit(queue.pop(0))
        for gain in engine.step().gains:
            assert gain.error is None, gain.error
            outputs[gain.request_id] += gain.tokens
    assert not engine.rows
    return outputs
