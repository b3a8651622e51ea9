"""The command line `mlxspec`."""

import argparse
import sys

from router.supervisor import daemon
from router.supervisor.options import add_serve_options
from router.version import VERSION

DESCRIPTION = "An LLM server for Apple silicon: speculative decoding for every request, when it pays."
EPILOG = """\
examples:
  mlxspec serve                                    serve the models in ~/.mlxspec/models on 127.0.0.1:8000
  mlxspec serve --model-path ./my-model --port 8123
  mlxspec serve --config config.toml

environment:
  MLXSPEC_HOME       where models, logs and sockets live (default: ~/.mlxspec)
  MODEL_PATH         a model folder, a Hugging Face id, or a folder of model folders
  MEMORY_LIMIT_GB    memory for all models together
"""


def main(arguments: list[str] | None = None) -> int:
    """Console script `mlxspec`; returns the exit code: 0 ok, 2 usage, 3 configuration."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    return daemon.serve(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all its commands."""
    parser = argparse.ArgumentParser(
        prog="mlxspec",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mlxspec {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    serve = commands.add_parser(
        "serve",
        help="run the server in the foreground",
        description="Run the server in the foreground until Ctrl-C. "
        "Options win over the environment, and that over the configuration file.",
    )
    add_serve_options(serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
