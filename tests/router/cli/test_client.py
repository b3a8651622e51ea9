"""The command line's HTTP client: where it looks for the server, and what it makes of errors."""

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import config as configuration
from common import paths
from common.config import Config, ServerConfig
from common.errors import ConfigError, InternalError, ModelNotFound
from router.cli.client import Client, connect
from router.cli.output import NoServer
from tests.e2e.server import free_port

ERROR = b'{"error": {"code": "model_not_found", "message": "no model x", "param": "model", "type": ""}}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        bodies = {
            "/key": (200, b'{"key": "%s"}' % self.headers.get("Authorization", "").encode()),
            "/missing": (404, ERROR),
            "/page": (500, b"<html>"),
            "/stream": (200, b': hi\n\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'),
            "/broken": (200, b'data: {"n": 1}\n\ndata: %b\n\n' % ERROR),
        }
        status, body = bodies[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_key_is_sent(url: str) -> None:
    assert Client(url, "s3cret").get("/key") == {"key": "Bearer s3cret"}
    assert Client(url).get("/key") == {"key": ""}


def test_errors_keep_the_servers_kind(url: str) -> None:
    with pytest.raises(ModelNotFound, match="no model x"):
        Client(url).get("/missing")
    with pytest.raises(InternalError, match="is this an mlxspec server"):
        Client(url).get("/page")


def test_events_end_with_done_or_an_error(url: str) -> None:
    assert list(Client(url).events("GET", "/stream")) == [{"n": 1}, {"n": 2}]
    events = Client(url).events("GET", "/broken")
    assert next(events) == {"n": 1}
    with pytest.raises(ModelNotFound):
        next(events)


def test_nobody_there_says_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NoServer, match=rf"{url} .*start one with: mlxspec serve"):
        Client(url).get("/health")


def test_server_is_found_by_option_environment_run_dir_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    monkeypatch.delenv("MLXSPEC_URL", raising=False)
    options = argparse.Namespace(url=None)
    assert connect(options).url == "http://127.0.0.1:8000"
    (tmp_path / "config.toml").write_text("[server]\nport = 8100\n")
    assert connect(options).url == "http://127.0.0.1:8100"
    paths.run_dir().mkdir()
    configuration.dump(Config(server=ServerConfig(host="::1", port=8200)), paths.run_dir() / "config.json")
    assert connect(options).url == "http://[::1]:8200"
    monkeypatch.setenv("MLXSPEC_URL", "localhost:8300")
    assert connect(options).url == "http://localhost:8300"
    assert connect(argparse.Namespace(url="http://localhost:8400")).url == "http://localhost:8400"
    with pytest.raises(ConfigError, match="no server's address"):
        Client("ftp://x")
