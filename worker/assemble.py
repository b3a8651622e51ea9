"""From a model's path and the configuration to an engine that can step: used by the served worker and the shell."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.config import Config, ModelConfig
from common.logs import fields
from common.messages import ModelFacts
from worker import backend, calibration, loader, matrices, self_test, slots
from worker.blas_threads import ThreadChoice
from worker.cache.ragged import UnsupportedCache
from worker.drafters.available import Available, load_head, load_layers
from worker.drafters.available import find as find_drafters
from worker.drafters.controller import Controller
from worker.drafting import Drafting
from worker.engine import Engine, Pace
from worker.prefix_cache import PrefixCache
from worker.scheduler import Limits
from worker.target import KVSize, Target
from worker.waiting import WaitingList

_GIB = 1 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that can answer."""

    engine: Engine
    tokenizer: Any
    facts: ModelFacts
    end_tokens: frozenset[int]


def assemble(path: str, config: Config, model: ModelConfig) -> Ready:
    """Load, check and time a model on the calling thread, to which its arrays then belong.

    Raises `BadModel` or `UnsupportedCache` for a model that cannot run here.
    """
    began = time.monotonic()
    backend.prepare()
    backend.set_blas_threads(config.engine.blas_threads)
    loaded = loader.load(path, model.weights or config.engine.weights)
    reference = self_test.reference_logits(loaded.model)
    kv_bits = config.engine.kv_bits if model.kv_bits is None else model.kv_bits
    target, unspeculative = _checked_target(loaded.model, reference, kv_bits)
    healed = None if unspeculative else load_layers(loaded)
    head = None if unspeculative else load_head(loaded, target)
    size = target.measure_kv()
    limits = _limits(config, model, size)
    slots.limit(target, limits)
    weights = loaded.weights + (f", {kv_bits}-bit cache" if kv_bits else "")
    times = calibration.measured_times(target, path, weights)
    available = Available()
    if not unspeculative:
        available = find_drafters(path, loaded, target, times, config, model, head, healed)
    engine = Engine(target, times, limits, _drafting(available, config), _pace(config))
    engine.prefixes = _prefixes(config, target)
    engine.waiting = WaitingList(config.engine.priority_aging_s)
    engine.on_step_time = _thread_setter(backend.blas_threads())
    facts = ModelFacts(
        architecture=str(loaded.config.get("model_type", "unknown")),
        context_tokens=loaded.context_tokens,
        vocabulary=loader.vocabulary_size(loaded.config, loaded.tokenizer),
        weights_dtype=loaded.weights,
        weights_bytes=loaded.weights_bytes + matrices.kept_bytes(loaded.model),
        kv_bytes_per_token=size.per_token,
        kv_bytes_per_row=size.per_row,
        speculation=not unspeculative,
        speculation_reason=unspeculative,
        backend=backend.describe(),
        has_chat_template=loaded.tokenizer.chat_template is not None,
        drafters=tuple(available.drafters),
        load_s=time.monotonic() - began,
        kv_bits=kv_bits,
    )
    gc.freeze()  # what is loaded stays: collections during steps need not look at it
    return Ready(engine, loaded.tokenizer, facts, loader.end_tokens(loaded.tokenizer, loaded.config))


def _checked_target(model: Any, reference: self_test.Reference, kv_bits: int) -> tuple[Target, str]:
    """The model with its caches, checked with unrounded keys and values first; and why it cannot speculate, or ""."""
    target = Target(model)
    unspeculative = self_test.check(target, reference)
    if kv_bits:
        target = _rounded(model, reference, kv_bits)
    if unspeculative:
        log.warning("The model decodes without speculation. %s", fields(reason=unspeculative))
    return target, unspeculative


def _rounded(model: Any, reference: self_test.Reference, kv_bits: int) -> Target:
    target = Target(model, kv_bits)
    try:
        fault = self_test.check(target, reference, self_test.ROUNDED_TOLERANCE[kv_bits])
    except self_test.WrongLogits as error:
        fault = str(error)
    if fault:
        raise UnsupportedCache(
            f"kv_bits is {kv_bits}, but this model does not work with quantized keys and values ({fault}): "
            "set kv_bits = 0 for it"
        )
    off = self_test.rounding_error(target, reference)
    log.info("Keys and values are rounded. %s", fields(kv_bits=kv_bits, logits_off=round(off, 4)))
    return target


def _thread_setter(most: int) -> Callable[[float, float], None] | None:
    """Sets OpenBLAS's threads after each step where there is a choice."""
    if most < 2:
        return None
    choice, current = ThreadChoice(most), most

    def after_step(seconds: float, usual_s: float) -> None:
        nonlocal current
        wanted = choice.observe(seconds, usual_s)
        if wanted != current:
            log.info("Another number of BLAS threads. %s", fields(threads=wanted, step_s=seconds, usual_s=usual_s))
            backend.set_blas_threads(wanted)
            current = wanted

    return after_step


def _limits(config: Config, model: ModelConfig, size: KVSize) -> Limits:
    return Limits(
        rows=model.max_batch_size or config.engine.max_batch_size,
        waiting=config.engine.max_waiting,
        kv_bytes=int(config.engine.kv_cache_gb * _GIB) or None,
        kv_bytes_per_token=size.per_token,
        kv_bytes_per_row=size.per_row,
        headroom_tokens=config.engine.kv_headroom_tokens,
    )


def _drafting(available: Available, config: Config) -> Drafting:
    return Drafting(
        available.drafters,
        in_auto=tuple(available.in_auto),
        max_tokens=config.speculation.max_draft_tokens,
        controller=Controller(priors=available.acceptance),
    )


def _prefixes(config: Config, target: Target) -> PrefixCache:
    if not config.engine.prefix_cache or not target.has_prefixes:
        return PrefixCache()
    return PrefixCache(int(config.engine.prefix_cache_gb * _GIB) or None)


def _pace(config: Config) -> Pace:
    return Pace(
        chunk_s=config.engine.prefill_chunk_ms / 1e3,
        chunk_alone_s=config.engine.prefill_chunk_alone_ms / 1e3,
    )
