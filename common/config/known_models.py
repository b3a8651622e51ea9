"""Which models there are: configured ones, those registered over HTTP, and folders in MLXSPEC_HOME/models."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common import paths, saved_state
from common.config.sections import Config, ModelConfig
from common.errors import ConfigError


def check_default_model(config: Config) -> None:
    """Raise `ConfigError` when the default model is none of the known ones."""
    known = discover_models(config)
    if config.default_model and config.default_model not in known:
        names = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"default_model is {config.default_model!r}; known models: {names}")


def discover_models(config: Config) -> dict[str, ModelConfig]:
    """Configured models, those registered over HTTP and every folder in MLXSPEC_HOME/models, as NAME or OWNER/NAME."""
    saved = saved_state.load(saved_state.default_path())
    there = {name: path for name, path in saved.models.items() if not os.path.isabs(path) or os.path.isdir(path)}
    registered = {name: ModelConfig(path=path) for name, path in there.items()}
    models = registered | _found_models(paths.models_dir()) | config.models
    pins = {name: pin for name, pin in saved.pins.items() if name in models}
    return models | {name: msgspec.structs.replace(models[name], pin=pin) for name, pin in pins.items()}


def first_models(config: Config) -> dict[str, ModelConfig]:
    """Those that are loaded at the start: the default one, then those that are always to be loaded."""
    models = discover_models(config)
    kept = [name for name, model in models.items() if model.preload or model.pin]
    return {name: models[name] for name in [default_model(config, models), *kept] if name in models}


def model_folders(root: Path) -> list[Path]:
    """Folders with a config.json in `root` (NAME) and in its sub-folders (OWNER/NAME); hidden ones are left out."""
    found: list[Path] = []
    for folder in _visible(root):
        if (folder / "config.json").is_file():
            found.append(folder)
        elif not folder.is_symlink():
            found += folders_in(folder)
    return found


def folders_in(root: Path) -> list[Path]:
    """Folders with a config.json in `root` itself."""
    return [folder for folder in _visible(root) if (folder / "config.json").is_file()]


def resolve_model_path(path: str) -> str:
    """An absolute folder if `path` names one (as it is, or below MLXSPEC_HOME/models), else `path`: a hub id."""
    for candidate in (Path(path).expanduser(), paths.models_dir() / path):
        if (candidate / "config.json").is_file():
            return str(candidate.absolute())
    return path


def default_model(config: Config, models: Mapping[str, ModelConfig]) -> str | None:
    """The model of a request that names none: the configured one, else the first configured, else the first found."""
    if config.default_model:
        return config.default_model
    return next(iter(config.models), None) or next(iter(sorted(models)), None)


def _found_models(root: Path) -> dict[str, ModelConfig]:
    return {f.relative_to(root).as_posix(): ModelConfig(path=str(f)) for f in model_folders(root)}


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
