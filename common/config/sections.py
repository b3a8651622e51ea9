"""One struct a section of config.toml, with its defaults."""

import msgspec

from common.groups import Group
from common.sampling import Sampling, Speculation


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
    keep_text: bool = False


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
