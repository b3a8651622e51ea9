"""`mlxspec serve`: the only verb that starts the supervisor."""

import argparse
from pathlib import Path

from common.config import Config, first_models, resolve_model_path
from common.errors import ConfigError
from router.cli.output import ExitStatus, Output
from router.cli.verbs import SERVER, Verbs
from router.hub.ids import looks_like_id
from router.hub.wishes import Wish
from router.supervisor.options import add_serve_options, read_config


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
    from router.cli.hub import download
    from router.supervisor import daemon  # only this verb pays for its imports

    config = read_config(options)
    if options.model_path and not _is_somewhere(options.model_path):
        path = options.model_path
        raise ConfigError(f"there is no folder {path!r}, and it is no id of Hugging Face (OWNER/NAME) either")
    for model_id in _far_models(config):
        status = download(Wish(id=model_id), output, is_for_server=True)
        if status != ExitStatus.OK:
            return status
    return daemon.serve(options)


def _is_somewhere(path: str) -> bool:
    """Whether it is a folder, a name in the store, or can be an id of the hub."""
    return Path(path).expanduser().exists() or resolve_model_path(path) != path or looks_like_id(path)


def _far_models(config: Config) -> list[str]:
    """Ids of the models that are to be loaded at the start and are not on this machine yet."""
    paths = [resolve_model_path(model.path) for model in first_models(config).values()]
    return [path for path in paths if looks_like_id(path)]
