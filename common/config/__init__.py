"""The configuration: read once from file, environment and command line, checked, and handed to all processes.

Later sources win: defaults, then the file, then the seed's environment variables, then the command line. The supervisor
writes the outcome to its run directory and hands that file to its children, so that all processes agree.
"""

from common.config.checks import LOG_LEVELS, LOOPBACK_HOSTS
from common.config.known_models import (
    check_default_model,
    default_model,
    discover_models,
    first_models,
    model_folders,
    resolve_model_path,
)
from common.config.reading import default_file, dump, load, load_effective
from common.config.sections import (
    Config,
    EngineConfig,
    GenerationConfig,
    HubConfig,
    LogConfig,
    ModelConfig,
    ServerConfig,
    SpeculationConfig,
    SupervisorConfig,
    default_sampling,
    default_speculation,
)

__all__ = [
    "LOG_LEVELS",
    "LOOPBACK_HOSTS",
    "Config",
    "EngineConfig",
    "GenerationConfig",
    "HubConfig",
    "LogConfig",
    "ModelConfig",
    "ServerConfig",
    "SpeculationConfig",
    "SupervisorConfig",
    "check_default_model",
    "default_file",
    "default_model",
    "default_sampling",
    "default_speculation",
    "discover_models",
    "dump",
    "first_models",
    "load",
    "load_effective",
    "model_folders",
    "resolve_model_path",
]
