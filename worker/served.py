"""A worker as the supervisor's child: loads its model on this thread, then runs the loop until told to stop."""

import logging
import os
import signal

import mlx.core as mx

from common.config import Config, ModelConfig
from common.logs import fields
from worker import backend, kept_text
from worker.assemble import assemble
from worker.child import Child
from worker.io_thread import IoThread, Name, Served
from worker.kept_text import KeptText
from worker.loop import Loop, Pulse
from worker.token_text import TokenTexts

log = logging.getLogger(__name__)


def run(child: Child, config: Config) -> None:
    """Serve one model. Raises `BadModel` or `UnsupportedCache` when it cannot be loaded."""
    pulse = Pulse()
    name = Name(child.identity, os.environ.get("MLXSPEC_TOKEN", ""), child.name, os.getpid())
    io = IoThread(name, child.run_dir, config, pulse)
    pulse.announce = io.announce
    io.start()
    signal.signal(signal.SIGTERM, lambda *_: io.stop())
    log.info("Loading the model. %s", fields(model=child.name, path=child.model))
    model = config.models.get(child.name) or ModelConfig(path=child.model)
    ready = assemble(child.model, config, model)
    log.info("Ready. %s", fields(model=child.name, backend=backend.describe(), weights=ready.facts.weights_dtype))
    if model.keep_text:
        ready.engine.on_answer = KeptText(kept_text.folder_of(child.name)).keep
    texts = TokenTexts(ready.tokenizer)
    io.ready(Served(ready.engine, ready.tokenizer, ready.facts, ready.end_tokens, texts))
    Loop(ready.engine, io.orders, io.publish, pulse, publishes_late=backend.name() != "cpu").run()
    log.info("Stopping. %s", fields(model=child.name, steps=ready.engine.totals.steps))
    ready.engine.target.clear()
    mx.synchronize()
    mx.clear_cache()
