"""`mlxspec serve` with the fake worker and router, as a process that can be killed."""

import argparse
import sys
from pathlib import Path

from common.errors import ConfigError
from router.supervisor import daemon, options
from router.supervisor.process import Commands

folder = Path(__file__).parent
commands = Commands(
    worker=(sys.executable, "-P", str(folder / "fake_worker.py")),
    router=(sys.executable, "-P", str(folder / "fake_router.py")),
)
parser = argparse.ArgumentParser()
options.add_serve_options(parser)
try:
    arguments = parser.parse_args()
    code = daemon.run(options.read_config(arguments), commands, read_again=lambda: options.read_config(arguments))
except ConfigError as error:
    print(f"mlxspec: {error}", file=sys.stderr)
    code = daemon.EXIT_CONFIG
sys.exit(code)
