"""`python -P -m router --run-dir RUN`: the router process, spawned by the supervisor."""

import argparse
import asyncio
import sys
from pathlib import Path

from common import config, lifeline, logs
from router import server

CONFIG_FILE = "config.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="router", description="mlxspec's HTTP server; the supervisor starts it.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with sockets and config.json")
    run_dir: Path = parser.parse_args().run_dir
    settings = config.load_effective(run_dir / CONFIG_FILE)
    logs.setup("router", settings.log.level)
    lifeline.watch()
    return asyncio.run(server.serve(run_dir, settings))


if __name__ == "__main__":
    sys.exit(main())
