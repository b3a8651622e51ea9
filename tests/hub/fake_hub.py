"""A small hub over real HTTP: the routes that a client needs to search, look up and download, and their mishaps.

Large files are redirected to another host name ("localhost"), as the real hub does, with ETag, size and ranges.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin")
CHUNK_BYTES = 4096
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """A repository: a folder, and how it misbehaves."""

    folder: Path
    tags: list[str] = field(default_factory=lambda: ["safetensors", "license:mit"])
    downloads: int = 0
    gated: bool = False
    status: int | None = None  # answer everything with this HTTP status
    drop_after: int | None = None  # cut the connection after so many bytes of a large file, once for each count
    drops: int = 0
    pause_s: float = 0.0  # between chunks of a large file
    spoil: bool = False  # send other bytes than the hash says
    left_out: list[str] = field(default_factory=list)  # names missing from its list of files
    hidden_files: list[str] = field(default_factory=list)  # further names in its list of files


class FakeHub:
    """The hub and its other host. `served` counts bytes by file, `requests` keeps (method, path, headers)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.served: dict[str, int] = {}
        self.token = "hf_right"  # what a gated repository wants
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path, **more: Any) -> Repo:
        self.repos[name] = Repo(folder, **more)
        return self.repos[name]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def model(self, name: str, repo: Repo, *, with_blobs: bool) -> dict[str, Any]:
        """The API's record of a model."""
        config = json.loads((repo.folder / "config.json").read_bytes())
        weights = repo.folder / "model.safetensors"
        return {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "downloads": repo.downloads,
            "likes": 3,
            "tags": repo.tags,
            "library_name": "mlx" if "mlx" in repo.tags else "transformers",
            "pipeline_tag": "text-generation",
            "gated": "manual" if repo.gated else False,
            "private": False,
            "lastModified": "2026-05-01T12:00:00.000Z",
            "config": {"model_type": config["model_type"]},
            "safetensors": {"parameters": {"BF16": weights.stat().st_size // 2}, "total": weights.stat().st_size // 2},
            "siblings": [
                *_siblings(repo, with_blobs=with_blobs),
                *({"rfilename": hidden, "size": 1, "blobId": "0" * 40} for hidden in repo.hidden_files),
            ],
        }


def _siblings(repo: Repo, *, with_blobs: bool) -> list[dict[str, Any]]:
    files = [path for path in sorted(repo.folder.rglob("*")) if path.is_file() and path.name not in repo.left_out]
    return [_sibling(repo.folder, path, with_blobs=with_blobs) for path in files]


def _sibling(folder: Path, path: Path, *, with_blobs: bool) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if not with_blobs:
        return {"rfilename": name}
    data = path.read_bytes()
    sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
    if name.endswith(LFS_SUFFIXES):
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return sibling


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _answer(self, *, has_body: bool) -> None:
            hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path == "/api/models":
                return self._list({key: values for key, values in parse_qs(url.query).items()})
            name, repo = self._repo(path)
            if repo is None:
                return self._refuse(404 if self._key() else 401, "RepoNotFound", "Repository not found")
            if repo.status is not None:
                return self._refuse(repo.status, "", "no", {"Retry-After": "7"} if repo.status == 429 else {})
            if "/resolve/" in path or path.startswith("/cdn/"):
                if repo.gated and path.startswith(f"/{name}") and self._key() != hub.token:
                    return self._refuse(
                        403 if self._key() else 401, "GatedRepo", f"Access to model {name} is restricted."
                    )
                return self._file(name, repo, path, has_body=has_body)
            revision = path.partition("/revision/")[2]
            if revision not in ("", "main", "v1", COMMIT):
                return self._refuse(404, "RevisionNotFound", "Invalid rev id")
            self._json(hub.model(name, repo, with_blobs="blobs" in url.query))

        def _key(self) -> str:
            return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

        def _repo(self, path: str) -> tuple[str, Repo | None]:
            for name, repo in hub.repos.items():
                if any(f"{path}/".startswith(f"{prefix}/{name}/") for prefix in ("", "/api/models", "/cdn")):
                    return name, repo
            return "", None

        def _list(self, query: dict[str, list[str]]) -> None:
            words = query.get("search", [""])[0].lower()
            found = [
                hub.model(name, repo, with_blobs=False)
                for name, repo in sorted(hub.repos.items(), key=lambda item: -item[1].downloads)
                if words in name.lower() and all(tag in repo.tags for tag in query.get("filter", []))
            ]
            self._json(found[: int(query.get("limit", ["100"])[0])])

        def _file(self, name: str, repo: Repo, path: str, *, has_body: bool) -> None:
            is_cdn = path.startswith("/cdn/")
            file = path.removeprefix(f"/cdn/{name}/") if is_cdn else path.partition("/resolve/")[2].partition("/")[2]
            place = repo.folder / file
            if not place.is_file():
                return self._refuse(404, "EntryNotFound", "Entry not found")
            data = place.read_bytes()
            is_large = file.endswith(LFS_SUFFIXES)
            if is_large and not is_cdn:
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
                location = f"http://localhost:{hub.port}/cdn/{name}/{file}"
                return self._head(302, 0, linked | {"Location": location})
            if repo.spoil and is_large:
                data = bytes(len(data))
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            headers = {"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._head(206 if start else 200, len(data) - start, headers)
            if has_body:
                self._send(file, repo, data[start:], is_large=is_large)

        def _send(self, file: str, repo: Repo, data: bytes, *, is_large: bool) -> None:
            sent = 0
            for begin in range(0, len(data), CHUNK_BYTES):
                if is_large and repo.drops > 0 and repo.drop_after is not None and sent >= repo.drop_after:
                    repo.drops -= 1
                    self.close_connection = True
                    self.connection.close()
                    return
                chunk = data[begin : begin + CHUNK_BYTES]
                try:
                    self.wfile.write(chunk)
                except OSError:  # the client has left
                    self.close_connection = True
                    return
                sent += len(chunk)
                hub.served[file] = hub.served.get(file, 0) + len(chunk)
                if is_large and repo.pause_s:
                    time.sleep(repo.pause_s)

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self._head(200, len(body), {"Content-Type": "application/json"})
            self.wfile.write(body)

        def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            told = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
            self._head(status, 0, told | (headers or {}))

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

    return Handler
