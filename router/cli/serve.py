"""`mlxspec serve`: the only verb that starts the supervisor."""

import argparse
from pathlib import Path

from common import config as configuration
from common.errors import ConfigError
from router.cli.output import ExitStatus, Output
from router.cli.verbs import SERVER, Verbs
from router.hub.ids import looks_like_id
from router.hub.wishes import Wish
from router.supervisor.options import add_serve_options


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "serve",
        topic=SERVER,
        help="run the server in the foreground",
        description="Run the server in the foreground until Ctrl-C. "
        "Options win over the environment, and that over the configuration file.",
        examples="mlxspec serve --model-path ./my-model --port 8123\nmlxspec serve --config config.toml",
        run=serve,
    )
    add_serve_options(parser)


def serve(options: argparse.Namespace, output: Output) -> int:
    from router.supervisor import daemon  # only this verb pays for its imports

    if options.model_path and not _is_here(options.model_path):
        status = _fetch(options.model_path, output)
        if status != ExitStatus.OK:
            return status
    return daemon.serve(options)


def _is_here(path: str) -> bool:
    return configuration.resolve_model_path(path) != path or Path(path).expanduser().exists()


def _fetch(path: str, output: Output) -> int:
    from router.cli.hub import download

    if not looks_like_id(path):
        raise ConfigError(f"there is no folder {path!r}, and it is no id of Hugging Face (OWNER/NAME) either")
    return download(Wish(id=path), output, is_for_server=True)
