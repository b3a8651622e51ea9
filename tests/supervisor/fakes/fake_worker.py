"""A worker without a model: says what one says, and misbehaves as its folder's `behaviour.json` orders."""

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import zmq.asyncio

from common import lifeline, logs, sockets, wire
from common.messages import (
    PROTOCOL_VERSION,
    Drain,
    Exit,
    Heartbeat,
    Message,
    ModelFacts,
    SetLimits,
    StateChanged,
    WorkerHello,
)
from common.states import WorkerState

parser = argparse.ArgumentParser()
for option in ("identity", "name", "model", "run-dir"):
    parser.add_argument(f"--{option}", required=True)
options = parser.parse_args()
behaviour = json.loads((Path(options.model) / "behaviour.json").read_text())
log = logging.getLogger(__name__)

FACTS = ModelFacts(
    architecture="fake",
    context_tokens=128,
    vocabulary=10,
    weights_dtype="float32",
    weights_bytes=behaviour.get("footprint", 1000),
    kv_bytes_per_token=0,
    backend="none",
    has_chat_template=False,
    drafters=(),
    load_s=0.0,
)


def note(what: str) -> None:
    with (Path(options.model) / "notes.txt").open("a") as notes:
        notes.write(f"{time.time():.3f} {options.identity} {what}\n")


def heartbeat(seq: int) -> Heartbeat:
    current = json.loads((Path(options.model) / "behaviour.json").read_text())
    return Heartbeat(
        loop_seq=current.get("stuck_at", seq),
        phase=current.get("phase", "idle"),
        slowest_step_s=current.get("slowest_step_s", 0.0),
        running=current.get("running", 0),
        waiting=0,
        finished=current.get("finished", 0),
        active_bytes=0,
        cache_bytes=0,
        footprint_bytes=current.get("footprint", 1000),
    )


async def main() -> int:
    context = zmq.asyncio.Context()
    socket = sockets.connect_dealer(context, Path(options.run_dir) / sockets.CONTROL_SOCKET, options.identity)

    async def say(message: Message) -> None:
        await socket.send(wire.encode(message))

    await say(
        WorkerHello(
            version=behaviour.get("version", PROTOCOL_VERSION),
            identity=options.identity,
            token=os.environ["MLXSPEC_TOKEN"],
            model=options.name,
            pid=os.getpid(),
        )
    )
    await say(StateChanged(state=WorkerState.LOADING))
    await asyncio.sleep(behaviour.get("load_s", 0.0))
    if code := behaviour.get("exit_on_load"):
        log.error("model cannot be used: %s", behaviour.get("reason", "no reason"))
        return int(code)
    await say(heartbeat(0))
    await say(StateChanged(state=WorkerState.READY, facts=FACTS))

    async def beat() -> None:
        seq = 0
        while True:
            seq += 1
            await say(heartbeat(seq))
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(beat())
    while True:
        order = wire.decode_worker_order(await socket.recv())
        note(type(order).__name__)
        match order:
            case Exit() if not behaviour.get("ignores_exit"):
                return 0
            case Drain():
                await say(StateChanged(state=WorkerState.DRAINING))
                await asyncio.sleep(behaviour.get("drain_s", 0.0))
                beating.cancel()
                return 0
            case SetLimits():
                note(f"kv_bytes={order.kv_bytes} cache_bytes={order.cache_bytes} shrink={order.shrink}")


lifeline.watch()
faulthandler.enable()
logs.setup(f"worker {options.name}")
if behaviour.get("ignores_exit"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("spawned")
if behaviour.get("mute"):
    time.sleep(600)
sys.exit(asyncio.run(main()))
