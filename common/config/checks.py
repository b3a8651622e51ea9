"""What no configuration may say: values out of range, and addresses that others reach without a key."""

import msgspec

from common import keys, paths
from common.config.sections import Config, ServerConfig, default_sampling, default_speculation
from common.errors import ConfigError, InvalidRequest, InvalidValue
from common.groups import check_names
from common.sampling import Speculation, check_sampling, check_speculation

WEIGHT_FORMS = ("auto", "stored", "float32", "bfloat16", "float16")
KV_BITS = (0, 4, 8)
MAX_REPLICAS = 64
LOG_LEVELS = ("debug", "info", "warning", "error")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


def checked(config: Config) -> Config:
    """The same configuration. Raises `ConfigError` that names the first value out of range."""
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


def check_bind(server: ServerConfig, known: keys.Keys) -> None:
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
