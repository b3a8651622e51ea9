"""`mlxspec serve`: the only verb that starts the supervisor."""

import argparse

from router.cli.output import Output
from router.cli.verbs import SERVER, Verbs
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

    return daemon.serve(options)
