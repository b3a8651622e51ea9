"""The models on this machine: folders below MLXSPEC_HOME/models, named NAME or OWNER/NAME.

A model appears there in one rename. What is under way lies in a hidden folder beside them, whose lock its process
holds; what was cut off stays there and is taken up again.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from common import paths
from common.config import model_folders
from common.errors import Conflict, Forbidden, ModelNotFound, NoSpace
from router.hub.ids import check_id
from router.hub.wishes import Wish
from router.units import in_units

ORIGIN_FILE = ".mlxspec.json"
PENDING = ".pending"
PLAN_FILE = ".plan.json"
UNKNOWN = "unknown"  # what nothing tells
SPARE_BYTES = 256 * 2**20  # what a download leaves free
CHUNK_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the hub has it: `sha256` of large files, git's `blob_id` of the others."""

    name: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model in the store came from. `form` is set when it was converted here; then sizes are its own."""

    id: str
    revision: str
    files: list[FileRecord]
    form: str | None = None
    license: str | None = None
    downloaded_at: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a download that is under way fetches: the wish, and the commit that its revision was when it began."""

    wish: Wish
    revision: str


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the store."""

    name: str
    path: str
    size_bytes: int
    modified_at: int
    architecture: str
    quantization: str
    origin: str | None
    revision: str | None


class PendingModel(msgspec.Struct, frozen=True, kw_only=True):
    """What was cut off, or is under way: a download with its `wish`, or a conversion (None)."""

    name: str
    size_bytes: int
    is_active: bool
    wish: Wish | None


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the store holds, and the room there is."""

    path: str
    models: int
    models_bytes: int
    pending: list[PendingModel]
    pending_bytes: int
    free_bytes: int


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is not as it should be."""

    file: str
    problem: str


class Store:
    """The folder of models."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or paths.models_dir()).absolute()

    # --- places -----------------------------------------------------------------------------------------

    def folder(self, name: str) -> Path:
        """Where that model lies or would lie, always inside the store. Raises `Forbidden` or `InvalidValue`."""
        path = self.root / check_id(name)
        if not _inside(path.parent, self.root):
            raise Forbidden(f"{path.parent} leads out of {self.root}; remove that link")
        return path

    def pending(self, name: str) -> Path:
        """The hidden folder in which the model is being made."""
        return self.root / PENDING / check_id(name).replace("/", "--")

    def find(self, name: str) -> Path:
        """The folder of a model that is there. Raises `ModelNotFound`."""
        path = self.folder(name)
        if not (path / "config.json").is_file():
            known = ", ".join(model.name for model in self.models()[:20]) or "none"
            raise ModelNotFound(f"{name} is not in {self.root}; there are: {known}", param="id")
        return path

    def has(self, name: str) -> bool:
        return (self.folder(name) / "config.json").is_file()

    # --- what there is ----------------------------------------------------------------------------------

    def models(self) -> list[LocalModel]:
        """Every model, by name."""
        return [self.describe(path) for path in model_folders(self.root)]

    def describe(self, path: Path) -> LocalModel:
        origin, config = read_origin(path), _config(path)
        return LocalModel(
            name=path.relative_to(self.root).as_posix(),
            path=str(path),
            size_bytes=_size(path),
            modified_at=int((path / "config.json").stat().st_mtime),
            architecture=str(config.get("model_type", UNKNOWN)),
            quantization=quantization_of(config),
            origin=origin.id if origin else None,
            revision=origin.revision if origin else None,
        )

    def stats(self) -> CacheStats:
        """Sizes of all of it."""
        models, pending = self.models(), self.unfinished()
        return CacheStats(
            path=str(self.root),
            models=len(models),
            models_bytes=sum(model.size_bytes for model in models),
            pending=pending,
            pending_bytes=sum(model.size_bytes for model in pending),
            free_bytes=self.free_bytes(),
        )

    def unfinished(self) -> list[PendingModel]:
        """Downloads that are under way or were cut off."""
        folder = self.root / PENDING
        if not folder.is_dir():
            return []
        return [_pending(path) for path in sorted(folder.iterdir()) if path.is_dir()]

    def free_bytes(self) -> int:
        """Room on the store's disk."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def check_space(self, needed_bytes: int, what: str) -> None:
        """Raise `NoSpace` unless so much fits, and some is left."""
        free = self.free_bytes()
        if needed_bytes + SPARE_BYTES > free:
            raise NoSpace(
                f"{what} needs {in_units(needed_bytes)} and {self.root} has {in_units(free)} free "
                f"({in_units(SPARE_BYTES)} stay free); see `mlxspec list` and `mlxspec rm`"
            )

    # --- changes ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """The hidden folder for making `name`, held alone by this process; it stays if something is in it.

        Raises `Conflict`.
        """
        folder = self.pending(name)
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(
                    f"{name} is being downloaded or converted by another process; wait for its end"
                ) from None
            try:
                yield folder
            finally:
                if folder.is_dir() and not any(folder.iterdir()):
                    self.forget_pending(folder)

    def publish(self, made: Path, name: str, origin: Origin | None) -> Path:
        """Put a finished folder in its place at once, in place of what was there. `made` lies on the same disk."""
        if origin is not None:
            (made / ORIGIN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(origin)))
        place = self.folder(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        old = made.parent / f".old-{os.getpid()}-{place.name}"
        if place.exists():
            place.rename(old)
        made.rename(place)
        _remove(old)
        return place

    @staticmethod
    def forget_pending(folder: Path) -> None:
        """Take away a hidden folder whose work is done."""
        _remove(folder)
        _lock(folder).unlink(missing_ok=True)

    @staticmethod
    def empty(folder: Path) -> None:
        """Take away a folder inside a hidden one."""
        _remove(folder)

    def delete(self, name: str) -> int:
        """Remove a model and what was left of its downloads; returns the bytes freed.

        A model that is a link to a folder elsewhere loses only the link.
        """
        place, pending = self.folder(name), self.pending(name)
        has_model = (place / "config.json").is_file() or place.is_symlink()
        if not has_model and not pending.is_dir():
            self.find(name)
        if pending.is_dir() and _is_locked(pending):
            raise Conflict(f"{name} is being downloaded; cancel that first")
        freed = (_size(place) if has_model and not place.is_symlink() else 0) + _size(pending)
        if has_model:
            _remove(place)
            if place.parent != self.root:
                with contextlib.suppress(OSError):  # not empty: it has other models
                    place.parent.rmdir()
        self.forget_pending(pending)
        return freed

    def verify(self, name: str) -> list[Problem]:
        """What differs from the hub's own record of sizes and hashes; empty if nothing does."""
        path = self.find(name)
        origin = read_origin(path)
        if origin is None:
            return [Problem(file=ORIGIN_FILE, problem="is missing: this model was not downloaded here")]
        return [p for record in origin.files if (p := check_file(path / record.name, record)) is not None]


def read_origin(folder: Path) -> Origin | None:
    """Where a model came from, if it says so."""
    try:
        return msgspec.json.decode((folder / ORIGIN_FILE).read_bytes(), type=Origin)
    except (OSError, msgspec.DecodeError):
        return None


def read_plan(folder: Path) -> Plan | None:
    """What the download in this hidden folder fetches, if it is one."""
    try:
        return msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError):
        return None


def check_file(path: Path, record: FileRecord) -> Problem | None:
    """Compare a file with its record."""
    try:
        size = path.stat().st_size
    except OSError:
        return Problem(file=record.name, problem="is missing")
    if size != record.size:
        return Problem(file=record.name, problem=f"has {size} bytes instead of {record.size}")
    if record.sha256 and _hash(path, hashlib.sha256()) != record.sha256:
        return Problem(file=record.name, problem="has another sha256")
    if not record.sha256 and record.blob_id and _git_hash(path, size) != record.blob_id:
        return Problem(file=record.name, problem="has another git hash")
    return None


def records_of(folder: Path) -> list[FileRecord]:
    """Records of the files that are there, hashed."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != ORIGIN_FILE)
    return [FileRecord(name=f.name, size=f.stat().st_size, sha256=_hash(f, hashlib.sha256())) for f in files]


def quantization_of(config: dict[str, object]) -> str:
    """In words: "4-bit", or the float type that the config names."""
    quantization = config.get("quantization") or config.get("quantization_config")
    if isinstance(quantization, dict) and isinstance(quantization.get("bits"), int):
        mode = quantization.get("mode", "affine")
        return f"{quantization['bits']}-bit" + ("" if mode == "affine" else f" {mode}")
    if isinstance(quantization, dict) and quantization.get("quant_method"):
        return str(quantization["quant_method"])
    return str(config.get("torch_dtype") or config.get("dtype") or UNKNOWN)


def now() -> int:
    return int(time.time())


def _pending(folder: Path) -> PendingModel:
    plan = read_plan(folder)
    return PendingModel(
        name=plan.wish.name if plan else folder.name.replace("--", "/"),
        size_bytes=_size(folder),
        is_active=_is_locked(folder),
        wish=plan.wish if plan else None,
    )


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _config(folder: Path) -> dict[str, object]:
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return config if isinstance(config, dict) else {}


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it is just being renamed
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_locked(folder: Path) -> bool:
    path = _lock(folder)
    if not path.exists():
        return False
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _hash(path: Path, digest: "hashlib._Hash") -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _git_hash(path: Path, size: int) -> str:
    return _hash(path, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
