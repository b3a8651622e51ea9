"""The entry of `mlxspec`: finds the verb, runs it, and turns errors into one line and an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence

from common import paths
from common.errors import ConfigError, MlxspecError
from router.cli import (
    completion,
    configuration,
    doctor,
    draft,
    groups,
    hub,
    run,
    running,
    serve,
    service,
    store,
    top,
)
from router.cli.output import ExitStatus, Output, status_of
from router.cli.verbs import Parser, Verbs
from router.version import VERSION

DESCRIPTION = "An LLM server for Apple silicon: speculative decoding for every request, when it pays."
EPILOG = """\
examples:
  mlxspec serve                                    serve the models in ~/.mlxspec/models on 127.0.0.1:8000
  mlxspec serve --model-path ./my-model --port 8123
  mlxspec download mlx-community/Qwen3-0.6B-4bit
  mlxspec run smollm2-135m "What is the capital of France?"

environment:
  MLXSPEC_HOME       where models, logs and sockets live (default: ~/.mlxspec)
  MLXSPEC_URL        the server that verbs talk to (default: the one running on MLXSPEC_HOME)
  MLXSPEC_API_KEY    the key that they send, if the server wants one
  HF_TOKEN           for gated and private models; HF_ENDPOINT and HF_HUB_OFFLINE=1 count too
  MODEL_PATH         a model folder, a Hugging Face id, or a folder of model folders
  MEMORY_LIMIT_GB    memory for all models together

exit codes:
  0 done   1 failed   2 wrong usage   3 wrong configuration   4 no server answers   5 not found   130 interrupted

`mlxspec COMMAND --help` says more about a command.
"""
GROUPS = (serve, run, hub, store, draft, running, top, groups, service, doctor, configuration, completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script `mlxspec`; returns the exit code (`ExitStatus`)."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return ExitStatus.USAGE
    output = Output(is_json=getattr(options, "json", False))
    try:
        return _run(options, output)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.OK


def _run(options: argparse.Namespace, output: Output) -> int:
    try:
        return int(options.run(options, output))
    except MlxspecError as error:
        output.error(error)
        return status_of(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        output.error(ConfigError(f"{error}; can {paths.home()} (MLXSPEC_HOME) be written?"))
        return ExitStatus.FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser with all its verbs; options know it as `parser`."""
    parser = Parser(prog="mlxspec", description=DESCRIPTION, epilog=EPILOG)
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"mlxspec {VERSION}")
    verbs = Verbs(parser)
    for group in GROUPS:
        group.add_verbs(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
