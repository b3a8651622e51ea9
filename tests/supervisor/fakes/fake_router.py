"""A router without HTTP: watches the model table, and ends as `router.json` in its state folder orders."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

import zmq.asyncio

from common import lifeline, logs, paths, sockets, wire
from common.messages import Watch

parser = argparse.ArgumentParser()
parser.add_argument("--run-dir", required=True)
options = parser.parse_args()
file = paths.home() / "router.json"
behaviour = json.loads(file.read_text()) if file.is_file() else {}


async def main() -> int:
    socket = sockets.connect_dealer(
        zmq.asyncio.Context(), Path(options.run_dir) / sockets.CONTROL_SOCKET, f"router-{os.getpid()}"
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    if code := behaviour.get("exit_before_watch"):
        logging.getLogger(__name__).error("cannot listen on port 8000")
        return int(code)
    await socket.send(wire.encode(Watch()))
    if behaviour.get("exit_after_watch"):
        return 1
    await ended.wait()
    await asyncio.sleep(behaviour.get("drain_s", 0.0))
    return 0


lifeline.watch()
logs.setup("router")
sys.exit(asyncio.run(main()))
