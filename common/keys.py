"""API keys: from a file that only its owner can read, or from the environment; never from an argument or over HTTP.

A *user* key may generate and look; an *admin* key may also load, unload, delete and change what the server keeps.
"""

import enum
import hmac
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import paths
from common.errors import ConfigError

USER_VARIABLE = "MLXSPEC_API_KEY"
ADMIN_VARIABLE = "MLXSPEC_ADMIN_KEY"
DEFAULT_FILE = "api_keys"  # in the state folder
MIN_KEY_CHARS = 16


class Scope(enum.IntEnum):
    """What a key is good for; a higher one includes the lower."""

    NONE = 0
    USER = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """The keys that are served, each with its scope. Without any, everybody who can connect may do everything."""

    scopes: tuple[tuple[bytes, Scope], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.scopes)

    def scope_of(self, given: str) -> Scope:
        """The best scope of this key. The time does not tell how much of a key was right, or which."""
        found = Scope.NONE
        for key, scope in self.scopes:
            if hmac.compare_digest(key, given.encode(errors="surrogatepass")):
                found = max(found, scope)
        return found


def load_keys(file: str = "", env: Mapping[str, str] = os.environ) -> Keys:
    """The keys of `file` (default: api_keys in the state folder, if it exists) and of the environment.

    Raises `ConfigError` for a file that others can read or that has an unreadable line, and for too short a key.
    """
    path = Path(file).expanduser() if file else paths.home() / DEFAULT_FILE
    keys = _read_file(path) if file or path.exists() else []
    for name, scope in ((USER_VARIABLE, Scope.USER), (ADMIN_VARIABLE, Scope.ADMIN)):
        if text := env.get(name, "").strip():
            keys.append((_checked(text, name), scope))
    return Keys(tuple(keys))


def _read_file(path: Path) -> list[tuple[bytes, Scope]]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}: others can use its API keys; run chmod 600 {path}")
    return [_parse(line, f"{path}:{number}") for number, line in _lines(text)]


def _lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate((line.strip() for line in text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _parse(line: str, place: str) -> tuple[bytes, Scope]:
    scope, *key = line.split()
    if len(key) != 1 or scope not in ("user", "admin"):
        raise ConfigError(f"{place} is not a line of the form 'user KEY' or 'admin KEY'")
    return _checked(key[0], place), Scope[scope.upper()]


def _checked(key: str, place: str) -> bytes:
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(f"the API key in {place} has {len(key)} characters; at least {MIN_KEY_CHARS} are needed")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"the API key in {place} has characters that a header cannot carry; use letters and digits")
    return key.encode()
