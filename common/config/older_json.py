"""JSON configuration files of an older shape: models as paths, batching among the server's keys.

    {"server": {"host", "port", "max_batch_size", "batch_timeout", "max_concurrent"}, "models": {NAME: PATH},
     "groups": {…}, "generation": {"auto_draft", "draft_layers_ratio", "trust_remote_code", …}}

They become the sections of config.toml; keys that are already ours pass through.
"""

from typing import Any

from common.errors import ConfigError

_MOVED = {
    ("server", "max_batch_size"): ("engine", "max_batch_size"),
    ("server", "max_concurrent"): ("server", "max_concurrent_requests"),
    ("generation", "auto_draft"): ("speculation", "auto_draft"),
    ("generation", "draft_layers_ratio"): ("speculation", "draft_layers_ratio"),
}
_NEEDLESS = (("server", "batch_timeout"),)  # rows join a running batch at any step: there is nothing to wait for


def in_our_shape(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The same configuration by our names.

    Raises `ConfigError` for what we refuse to do, and for a setting that is given in both its places.
    """
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    _refuse_remote_code(sections, source)
    for section, key in _NEEDLESS:
        _take(sections, section, key)
    for (section, key), (new_section, new_key) in _MOVED.items():
        found = _take(sections, section, key)
        if found is not None:
            _put(sections, new_section, new_key, found, f"{source}: {section}.{key}")
    models = sections.get("models")
    if isinstance(models, dict):
        sections["models"] = {name: {"path": m} if isinstance(m, str) else m for name, m in models.items()}
    return sections


def _refuse_remote_code(sections: dict[str, Any], source: str) -> None:
    if _take(sections, "generation", "trust_remote_code"):
        raise ConfigError(f"{source}: trust_remote_code is true; code of models is never run, set it to false")


def _take(sections: dict[str, Any], section: str, key: str) -> Any:
    values = sections.get(section)
    return values.pop(key, None) if isinstance(values, dict) else None


def _put(sections: dict[str, Any], section: str, key: str, value: Any, old: str) -> None:
    values = sections.setdefault(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{section} must be a section, not a value")
    if key in values:
        raise ConfigError(f"{old} and {section}.{key} are the same setting; give one of them")
    values[key] = value
