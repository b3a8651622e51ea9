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
from worker import backend, calibration, loader, self_test
from worker.blas_threads import ThreadChoice
from worker.drafters.ngram import NgramDrafter
from worker.engine import Engine, Pace
from worker.scheduler import Limits
from worker.target import KVSize, Target

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
    target = Target(loaded.model)
    unspeculative = self_test.check(target, reference)
    if unspeculative:
        log.warning("The model decodes without speculation. %s", fields(reason=unspeculative))
    size = target.measure_kv()
    times = calibration.measured_times(target, path, loaded.weights)
    engine = Engine(target, times, _limits(config, model, size), _drafter(config), _pace(config))
    engine.speculates = not unspeculative
    engine.on_step_time = _thread_setter(backend.blas_threads())
    facts = ModelFacts(
        architecture=str(loaded.config.get("model_type", "unknown")),
        context_tokens=loaded.context_tokens,
        vocabulary=vocabulary_size(loaded.config, loaded.tokenizer),
        weights_dtype=loaded.weights,
        weights_bytes=loaded.weights_bytes,
        kv_bytes_per_token=size.per_token,
        kv_bytes_per_row=size.per_row,
        speculation=engine.speculates,
        speculation_reason=unspeculative,
        backend=backend.describe(),
        has_chat_template=loaded.tokenizer.chat_template is not None,
        drafters=(engine.drafter.name,),
        load_s=time.monotonic() - began,
    )
    gc.freeze()  # what is loaded stays: collections during steps need not look at it
    return Ready(engine, loaded.tokenizer, facts, loader.end_tokens(loaded.tokenizer, loaded.config))


def vocabulary_size(config: dict[str, Any], tokenizer: Any) -> int:
    """Rows of the embedding: ids beyond it cannot be looked up."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size) if size else len(tokenizer)


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
    )


def _drafter(config: Config) -> NgramDrafter:
    return NgramDrafter(config.speculation.ngram_max_match)


def _pace(config: Config) -> Pace:
    return Pace(
        chunk_s=config.engine.prefill_chunk_ms / 1e3,
        chunk_alone_s=config.engine.prefill_chunk_alone_ms / 1e3,
        max_draft_tokens=config.speculation.max_draft_tokens,
    )
