"""The HTTP client of the verbs that talk to a running server."""

import argparse
import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from common import config as configuration
from common import paths
from common.errors import ConfigError, InternalError, MlxspecError, from_code
from router.cli.output import NoServer

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
MAX_LINE_BYTES = 1 << 20


def quoted(name: str) -> str:
    """A model's name as part of a URL; slashes stay."""
    return quote(name, safe="/")


class Client:
    """Calls to one server. Every error is one of ours, by the code that the server gave."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._parts = _address(url)
        self.url = f"{self._parts.scheme}://{self._parts.netloc}"
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 0.0) -> Any:
        """The answer's JSON. Raises `NoServer`, or the server's error."""
        with self._answer(method, path, body, timeout_s or ANSWER_TIMEOUT_S) as answer:
            raw = answer.read()
        return _decoded(raw)

    def events(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """The events of a stream as they come; an error among them is raised."""
        with self._answer(method, path, body, timeout_s or ANSWER_TIMEOUT_S) as answer:
            for data in _data_lines(answer, self.url):
                if data == b"[DONE]":
                    return
                event = _decoded(data)
                if event.get("error"):
                    raise _error(event)
                yield event

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_TIMEOUT_S)
        with contextlib.closing(connection):
            answer = self._begin(connection, method, path, None if body is None else json.dumps(body), timeout_s)
            if answer.status >= 400:
                raise _error(_decoded(answer.read()), answer.status)
            yield answer

    def _begin(
        self, connection: http.client.HTTPConnection, method: str, path: str, payload: str | None, timeout_s: float
    ) -> http.client.HTTPResponse:
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request(method, path, payload, self._headers)
            return connection.getresponse()
        except TimeoutError as error:
            raise NoServer(
                f"{self.url} did not answer within {timeout_s:g} s; is it busy? see {self.url}/health"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise NoServer(
                f"no server answers on {self.url} ({getattr(error, 'strerror', None) or error}); "
                "start one with: mlxspec serve, or name another with --url"
            ) from error


def connect(options: argparse.Namespace) -> Client:
    """The client of the server that options, environment or the running server's own configuration name."""
    url = options.url or os.environ.get("MLXSPEC_URL", "").strip() or _own_url()
    return Client(url, os.environ.get("MLXSPEC_API_KEY", "").strip())  # not an option: others can read a command line


def _address(url: str) -> SplitResult:
    """Raises `ConfigError` unless it is one of HTTP."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # of its port or brackets
        pass
    raise ConfigError(f"{url!r} is no server's address; give one such as http://127.0.0.1:8000")


def _own_url() -> str:
    """Of the server on MLXSPEC_HOME: as it was started, or, when none runs, as it would be."""
    effective = paths.run_dir() / "config.json"
    config = configuration.load_effective(effective) if effective.is_file() else configuration.load()
    host = config.server.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def _data_lines(answer: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    try:
        while line := answer.readline(MAX_LINE_BYTES):
            if line.startswith(b"data: "):
                yield line[6:].strip()
    except (OSError, http.client.HTTPException) as error:
        raise NoServer(f"the connection to {url} broke in the middle of an answer: {error or 'time-out'}") from error


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw or b"{}")
    except ValueError as error:
        raise InternalError(f"the answer is no JSON ({raw[:80]!r}); is this an mlxspec server?") from error


def _error(answer: Any, status: int = 500) -> MlxspecError:
    detail = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(detail, dict):
        return InternalError(f"the server answered with HTTP {status}; is this an mlxspec server?")
    return from_code(str(detail.get("code")), str(detail.get("message")), detail.get("param"))
