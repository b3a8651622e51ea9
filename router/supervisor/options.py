"""Options of `mlxspec serve` and `mlxspec-supervisor`, and the configuration they make."""

import argparse
import os
from pathlib import Path

from common import config as configuration
from common.config import LOG_LEVELS, Config


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """All options that start a server."""
    where = parser.add_argument_group("where")
    where.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    where.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model-path",
        metavar="PATH",
        help="a model folder, a Hugging Face id, or a folder of model folders",
    )
    what.add_argument("--memory-limit-gb", metavar="N", type=float, help="memory for all models together")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="configuration file, TOML or JSON (default: config.toml in MLXSPEC_HOME, if there is one)",
    )
    how.add_argument(
        "--draft-ratio",
        metavar="R",
        type=float,
        help="share of a model's own layers in its drafter (default: 0.5; 0: none)",
    )
    levels = ", ".join(LOG_LEVELS)
    how.add_argument("--log-level", metavar="LEVEL", choices=LOG_LEVELS, help=f"{levels} (default: info)")


def read_config(arguments: argparse.Namespace) -> Config:
    """File, environment and options together. Raises `ConfigError`."""
    options = {
        "server.host": arguments.host,
        "server.port": arguments.port,
        "supervisor.memory_limit_gb": arguments.memory_limit_gb,
        "speculation.draft_layers_ratio": arguments.draft_ratio,
        "log.level": arguments.log_level,
    }
    env = dict(os.environ)
    if arguments.model_path:
        env["MODEL_PATH"] = arguments.model_path
    chosen = {key: value for key, value in options.items() if value is not None}
    return configuration.load(arguments.config, env, chosen)
