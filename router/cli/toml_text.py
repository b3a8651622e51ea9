"""Settings as TOML text. The standard library only reads TOML."""

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(settings: Mapping[str, Any]) -> str:
    """Nested settings as TOML; those that are None are left out, since TOML has no such value."""
    return "\n\n".join(block for block in _blocks(settings, ()) if block) + "\n"


def _blocks(settings: Mapping[str, Any], place: tuple[str, ...]) -> list[str]:
    values = {key: value for key, value in settings.items() if value is not None}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    if place and (lines or not values):
        lines.insert(0, f"[{'.'.join(map(_key, place))}]")
    inner = [_blocks(value, (*place, key)) for key, value in values.items() if isinstance(value, Mapping)]
    return ["\n".join(lines), *(block for blocks in inner for block in blocks)]


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _text(value)
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return str(value)


def _text(text: str) -> str:
    """JSON's escapes are also TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
