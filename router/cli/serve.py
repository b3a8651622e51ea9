"""`mlxspec serve`: the only verb that starts the supervisor."""

import argparse
from pathlib import Path

from common import config as configuration
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

    if options.model_path and _is_only_on_the_hub(options.model_path):
        from router.cli.hub import download

        if (status := download(Wish(id=options.model_path), output, is_for_server=True)) != ExitStatus.OK:
            return status
    return daemon.serve(options)


def _is_only_on_the_hub(path: str) -> bool:
    """Whether `path` is an id of the hub whose model is not here yet."""
    resolved = configuration.resolve_model_path(path)
    return resolved == path and looks_like_id(path) and not Path(path).exists()
