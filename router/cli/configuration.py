"""`mlxspec config`: what the settings are, and whether a server could start with them."""

import argparse
from pathlib import Path
from typing import Any

import msgspec

from common import config as configuration
from common.config import Config, ModelConfig
from router.cli.output import ExitStatus, Output
from router.cli.toml_text import toml_text
from router.cli.verbs import SETUP, Verbs, add_json

HUB_ID_PARTS = 2


class ModelCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model is to come from; `folder` is None for one of the hub, `problem` empty for one that can be had."""

    name: str
    path: str
    folder: str | None
    problem: str = ""


class ConfigCheck(msgspec.Struct, frozen=True, kw_only=True):
    """`file` is None when everything has its default, the environment's or the command line's value."""

    file: str | None
    is_ok: bool
    models: list[ModelCheck]


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "config",
        topic=SETUP,
        help="show the settings, or check them",
        description="Settings come from the defaults, then the configuration file, then the environment.",
        examples="mlxspec config check\nmlxspec config check --config other.toml\nmlxspec config show --changed",
    )
    inner = Verbs(parser, dest="config_command", is_required=True)
    check = inner.add(
        "check",
        help="say whether a server could start with the settings",
        description="Check every key and value, and that each model can be found. Exits with 3 if not.",
        examples="mlxspec config check --config config.toml",
        run=run_check,
    )
    show = inner.add(
        "show",
        help="print the settings as they count",
        description="Print every setting as it counts, as TOML.",
        examples="mlxspec config show --changed\nmlxspec config show --json | jq .server.port",
        run=run_show,
    )
    show.add_argument("--changed", action="store_true", help="only what differs from the defaults")
    for verb in (check, show):
        verb.add_argument(
            "--config",
            metavar="FILE",
            type=Path,
            help="configuration file, TOML or JSON (default: config.toml in MLXSPEC_HOME, if there is one)",
        )
        add_json(verb)


def run_check(options: argparse.Namespace, output: Output) -> int:
    config = configuration.load(options.config)
    configuration.check_default_model(config)
    models = [_checked(name, model) for name, model in sorted(configuration.discover_models(config).items())]
    problems = [model for model in models if model.problem]
    found = ConfigCheck(file=_file(options.config), is_ok=not problems, models=models)
    if output.is_json:
        output.json(found)
    else:
        output.table(
            ("model", "path", "state"),
            [(m.name, m.path, m.problem or ("found" if m.folder else "comes from the hub")) for m in models],
        )
        output.line(f"{found.file or 'no configuration file'}: {_verdict(len(models), len(problems))}")
    return ExitStatus.OK if found.is_ok else ExitStatus.CONFIG


def run_show(options: argparse.Namespace, output: Output) -> int:
    settings: dict[str, Any] = msgspec.to_builtins(configuration.load(options.config))
    if options.changed:
        settings = _changed(settings, msgspec.to_builtins(Config()))
    if output.is_json:
        output.json(settings)
    elif settings:
        output.write(toml_text(settings))
    else:
        output.note("nothing differs from the defaults")
    return ExitStatus.OK


def _file(given: Path | None) -> str | None:
    path = given or configuration.default_file()
    return str(path) if path.is_file() else None


def _checked(name: str, model: ModelConfig) -> ModelCheck:
    folder = configuration.resolve_model_path(model.path)
    if Path(folder).is_absolute() and (Path(folder) / "config.json").is_file():
        return ModelCheck(name=name, path=model.path, folder=folder)
    is_hub_id = not model.path.startswith(("/", ".", "~")) and len(model.path.split("/")) == HUB_ID_PARTS
    problem = "" if is_hub_id else "is neither a folder with a config.json nor a Hugging Face id"
    return ModelCheck(name=name, path=model.path, folder=None, problem=problem)


def _verdict(models: int, problems: int) -> str:
    if problems:
        have = "model has" if problems == 1 else "models have"
        return f"{problems} {have} a problem"
    return f"every key is right; {models} {'model' if models == 1 else 'models'}"


def _changed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What differs, by section; the models as a whole."""
    different = {key: value for key, value in settings.items() if value != defaults[key]}
    return {
        key: _changed(value, defaults[key]) if isinstance(value, dict) and defaults[key] else value
        for key, value in different.items()
    }
