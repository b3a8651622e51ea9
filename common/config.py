"""The configuration: one struct a section of config.toml, read once from file, environment and command line.

Later sources win: defaults, then the file, then the seed's environment variables, then the command line. The supervisor
writes the outcome to its run directory and hands that file to its children, so that all processes agree.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from common import keys, paths, saved_state, seed_config
from common.errors import ConfigError, InvalidRequest, InvalidValue
from common.groups import Group, check_names
from common.sampling import Sampling, Speculation, check_sampling, check_speculation

WEIGHT_FORMS = ("auto", "stored", "float32", "bfloat16", "float16")
KV_BITS = (0, 4, 8)
MAX_REPLICAS = 64
LOG_LEVELS = ("debug", "info", "warning", "error")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: an unknown key is an error that names it."""


class ServerConfig(Section, frozen=True, kw_only=True):
    """[server]: the HTTP side."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_concurrent_requests: int = 256
    max_body_bytes: int = 10 * 1024 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    load_timeout_s: float = 600.0
    request_timeout_s: float = 1800.0
    max_choices: int = 8
    max_batch_prompts: int = 256
    max_waiting_per_model: int = 256
    max_connections: int = 2048
    api_keys_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


class GenerationConfig(Section, frozen=True, kw_only=True):
    """[generation]: what a request gets that does not say."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 1024


class SpeculationConfig(Section, frozen=True, kw_only=True):
    """[speculation]: which drafter, and how far it may go."""

    drafter: str = "auto"
    max_draft_tokens: int = 8
    ngram_max_match: int = 5
    auto_draft: bool = True
    draft_layers_ratio: float = 0.5
    draft_model: str = ""


class EngineConfig(Section, frozen=True, kw_only=True):
    """[engine]: a worker's batch loop."""

    max_batch_size: int = 32
    max_waiting: int = 1024
    prefill_chunk_ms: float = 100.0
    prefill_chunk_alone_ms: float = 800.0
    weights: str = "auto"
    blas_threads: int = 0
    kv_cache_gb: float = 0.0
    kv_bits: int = 0
    prefix_cache: bool = True
    prefix_cache_gb: float = 0.0
    kv_headroom_tokens: int = 256
    priority_aging_s: float = 30.0


class SupervisorConfig(Section, frozen=True, kw_only=True):
    """[supervisor]: who is loaded, and what happens when something dies."""

    memory_limit_gb: float = 0.0
    heartbeat_s: float = 0.25
    start_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    stop_timeout_s: float = 5.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 60.0
    immediate_restarts: int = 3
    stable_after_s: float = 60.0
    hang_timeout_s: float = 9.0
    compile_timeout_s: float = 120.0
    idle_unload_s: float = 0.0
    turn_s: float = 30.0


class HubConfig(Section, frozen=True, kw_only=True):
    """[hub]: models over HTTP."""

    model_roots: list[str] = []


class LogConfig(Section, frozen=True, kw_only=True):
    """[log]: `max_bytes` of each log file; then it becomes the first of its `backups`."""

    level: str = "info"
    max_bytes: int = 10 * 1024 * 1024
    backups: int = 3


class ModelConfig(Section, frozen=True, kw_only=True):
    """[models.NAME]: `path` is a folder (absolute, or below MLXSPEC_HOME/models) or a Hugging Face id."""

    path: str
    preload: bool = False
    pin: bool = False
    replicas: int = 1
    idle_unload_s: float | None = None
    weights: str | None = None
    max_batch_size: int | None = None
    kv_bits: int | None = None
    drafter: str | None = None
    draft_model: str | None = None
    draft_layers_ratio: float | None = None


class Config(Section, frozen=True, kw_only=True):
    """Everything that can be set."""

    default_model: str = ""
    server: ServerConfig = ServerConfig()
    generation: GenerationConfig = GenerationConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    engine: EngineConfig = EngineConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    hub: HubConfig = HubConfig()
    log: LogConfig = LogConfig()
    models: dict[str, ModelConfig] = {}
    groups: dict[str, Group] = {}
    aliases: dict[str, str] = {}


# --- reading ---------------------------------------------------------------------------------------


def load(
    path: Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from `path` (default: config.toml in the state folder, if there is one).

    `overrides` has dotted keys (`server.port`). Raises `ConfigError` naming the file and the key at fault.
    """
    raw: dict[str, Any] = _read_file(path)
    for key, value in (_from_environment(env) | dict(overrides or {})).items():
        _put(raw, key.split("."), value)
    config = _checked(_convert(raw, str(path or "configuration")))
    _check_bind(config.server, keys.load_keys(config.server.api_keys_file, env))
    return config


def dump(config: Config, path: Path) -> None:
    """Write the effective configuration for child processes (JSON, mode 0600)."""
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def load_effective(path: Path) -> Config:
    """What `dump` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Config)


def default_file() -> Path:
    """The file that is read when none is named; it need not exist."""
    return paths.home() / "config.toml"


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


def _found_models(root: Path) -> dict[str, ModelConfig]:
    folders = _model_folders(root)
    if root.is_dir():  # downloaded ones lie in a folder for their owner
        owners = [f for f in root.iterdir() if f.is_dir() and not f.is_symlink() and not f.name.startswith(".")]
        folders += [model for owner in owners if owner not in folders for model in _model_folders(owner)]
    return {f.relative_to(root).as_posix(): ModelConfig(path=str(f)) for f in sorted(folders)}


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


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        path = paths.home() / "config.toml"
        if not path.is_file():
            return {}
    try:
        text = path.read_text(encoding="utf-8")
        return _from_json(text, path) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _from_json(text: str, path: Path) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return seed_config.in_our_shape(raw, str(path))


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (key, kind) in _VARIABLES.items():
        if text := env.get(name, "").strip():
            values[key] = kind(name, text)
    if path := env.get("MODEL_PATH", "").strip():
        values |= _models_from_path(path)
    return values


def _models_from_path(path: str) -> dict[str, Any]:
    """MODEL_PATH is one model (its folder or hub id), which becomes the default, or a folder of model folders."""
    folder = Path(path).expanduser().absolute()
    if (folder / "config.json").is_file() or not folder.is_dir():
        name = Path(path).name
        return {f"models.{_escape(name)}.path": path, "default_model": name}
    found = _model_folders(folder)
    if not found:
        raise ConfigError(f"MODEL_PATH={path} holds neither a config.json nor model folders that do")
    return {f"models.{_escape(model.name)}.path": str(model) for model in found}


def _model_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and (f / "config.json").is_file())


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a whole number") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a number") from error


def _text(name: str, text: str) -> str:
    return text


def _truth(name: str, text: str) -> bool:
    truths = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    try:
        return truths[text.lower()]
    except KeyError as error:
        raise ConfigError(f"{name}={text!r} is neither true nor false") from error


_VARIABLES: dict[str, tuple[str, Any]] = {
    "AUTO_DRAFT": ("speculation.auto_draft", _truth),
    "DRAFT_LAYERS_RATIO": ("speculation.draft_layers_ratio", _number),
    "DRAFT_MODEL_PATH": ("speculation.draft_model", _text),
    "MAX_BATCH_SIZE": ("engine.max_batch_size", _integer),
    "MAX_CONCURRENT_REQUESTS": ("server.max_concurrent_requests", _integer),
    "MEMORY_LIMIT_GB": ("supervisor.memory_limit_gb", _number),
}


def _escape(name: str) -> str:
    return name.replace(".", "\0")


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    *sections, last = (key.replace("\0", ".") for key in keys)
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{section} must be a section, not a value")
    raw[last] = value


def _convert(raw: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def _checked(config: Config) -> Config:
    _check_positive(config)
    try:
        check_sampling(default_sampling(config.generation))
        check_speculation(default_speculation(config.speculation))
        for model in config.models.values():
            check_speculation(Speculation(drafter=model.drafter or "auto"))
    except InvalidValue as error:
        raise ConfigError(f"[generation], [speculation] or [models]: {error}") from error
    try:
        check_names(config.groups, config.aliases)
    except InvalidRequest as error:
        raise ConfigError(f"[groups] or [aliases]: {error}") from error
    ratios = (config.speculation.draft_layers_ratio, *(m.draft_layers_ratio or 0.0 for m in config.models.values()))
    if wrong := [ratio for ratio in ratios if not 0 <= ratio < 1]:
        raise ConfigError(f"draft_layers_ratio is {wrong[0]}; it must lie in [0, 1)")
    for form in (config.engine.weights, *(m.weights for m in config.models.values() if m.weights)):
        if form not in WEIGHT_FORMS:
            raise ConfigError(f"weights is {form!r}; possible: {', '.join(WEIGHT_FORMS)}")
    for bits in (config.engine.kv_bits, *(m.kv_bits for m in config.models.values() if m.kv_bits is not None)):
        if bits not in KV_BITS:
            raise ConfigError(f"kv_bits is {bits}; possible: {', '.join(map(str, KV_BITS))} (0: not quantized)")
    for name, model in config.models.items():
        if not 0 < model.replicas <= MAX_REPLICAS:
            raise ConfigError(f"models.{name}.replicas is {model.replicas}; it must lie in [1, {MAX_REPLICAS}]")
        if model.idle_unload_s is not None and model.idle_unload_s < 0:
            raise ConfigError(f"models.{name}.idle_unload_s is {model.idle_unload_s}; it must not be negative")
    if config.log.level not in LOG_LEVELS:
        raise ConfigError(f"log.level is {config.log.level!r}; possible: {', '.join(LOG_LEVELS)}")
    return config


def _check_bind(server: ServerConfig, known: keys.Keys) -> None:
    """Others may connect only where a key keeps them out."""
    if server.host not in LOOPBACK_HOSTS and not known:
        raise ConfigError(
            f"server.host is {server.host}: without API keys only loopback addresses are served "
            f"({', '.join(LOOPBACK_HOSTS)}); put a line 'user KEY' into {paths.home() / keys.DEFAULT_FILE} (mode 600), "
            f"or set {keys.USER_VARIABLE}"
        )


_MAY_BE_NEGATIVE = {"presence_penalty", "frequency_penalty"}  # their range is checked with the rest of sampling
_MAY_BE_ZERO = {
    "top_k",
    "min_p",
    "temperature",
    "max_draft_tokens",
    "blas_threads",
    "kv_cache_gb",
    "kv_bits",
    "prefix_cache_gb",
    "memory_limit_gb",
    "draft_layers_ratio",
    "idle_unload_s",
    "turn_s",
}


def _check_positive(config: Config) -> None:
    if not 0 < config.server.port < 65536:
        raise ConfigError(f"server.port is {config.server.port}; it must lie in [1, 65535]")
    for section in ("server", "generation", "speculation", "engine", "supervisor", "log"):
        for key, value in msgspec.structs.asdict(getattr(config, section)).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and key not in _MAY_BE_NEGATIVE
            if is_number and (value < 0 or (value == 0 and key not in _MAY_BE_ZERO)):
                raise ConfigError(f"{section}.{key} is {value}; it must be positive")


def default_sampling(generation: GenerationConfig) -> Sampling:
    """The sampling of a request that sets nothing."""
    return Sampling(
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
    )


def default_speculation(speculation: SpeculationConfig) -> Speculation:
    """The speculation of a request that sets nothing; without `auto_draft`, `auto` means plain decoding."""
    is_plain = speculation.drafter == "auto" and not speculation.auto_draft
    return Speculation(
        drafter="none" if is_plain else speculation.drafter, max_draft_tokens=speculation.max_draft_tokens
    )
