"""`mlxspec config`: check a configuration, show what counts."""

import argparse
from pathlib import Path

import msgspec

from common import config as configuration
from common import paths
from router.cli.output import ExitStatus, Output
from router.cli.verbs import SETUP, Verbs, add_json


def add_verbs(verbs: Verbs) -> None:
    config = verbs.add(
        "config",
        topic=SETUP,
        help="check or show the configuration",
        examples="mlxspec config check\nmlxspec config show --config my.toml",
    )
    inner = Verbs(config, dest="action", is_required=True)
    check = inner.add("check", help="say whether the configuration can be used", run=run_check)
    show = inner.add(
        "show", help="show every key with the value that counts: file and environment together", run=run_show
    )
    for parser in (check, show):
        parser.add_argument("--config", metavar="FILE", type=Path, help="(default: config.toml in MLXSPEC_HOME)")
        add_json(parser)


def run_check(options: argparse.Namespace, output: Output) -> int:
    config = configuration.load(options.config)
    models = configuration.discover_models(config)
    source = str(options.config or _own_file() or "the defaults")
    if output.is_json:
        output.json({"ok": True, "source": source, "models": sorted(models)})
    else:
        output.line(f"{source}: ok, {len(models)} {'model' if len(models) == 1 else 'models'}")
    return ExitStatus.OK


def run_show(options: argparse.Namespace, output: Output) -> int:
    config = configuration.load(options.config)
    if output.is_json:
        output.json(config)
        return ExitStatus.OK
    for line in _toml(msgspec.to_builtins(config)):
        output.line(line)
    return ExitStatus.OK


def _own_file() -> Path | None:
    path = paths.home() / "config.toml"
    return path if path.is_file() else None


def _toml(values: dict[str, object], prefix: str = "") -> list[str]:
    """The configuration as TOML: plain values first, then a table each."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    lines = [line for line in lines if not line.endswith(" = null")]  # TOML has no null: the key is left out
    for key, value in values.items():
        if isinstance(value, dict):
            name = f"{prefix}{_key(key)}"
            inner = _toml(value, f"{name}.")
            lines += ["", f"[{name}]", *inner] if any(not isinstance(v, dict) for v in value.values()) else inner
    return lines


def _key(key: str) -> str:
    is_bare = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
    return key if is_bare else _value(key)


def _value(value: object) -> str:
    return msgspec.json.encode(value).decode()
