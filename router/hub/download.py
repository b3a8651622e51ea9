"""Download a model into the store, and bring it into another form on request.

Files go to a hidden folder and appear in the store together, in one rename. A download that was killed or cancelled
goes on where it stopped: finished files stay, and a file that came in part is continued by a range request.
"""

import concurrent.futures
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import msgspec
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars

from common.errors import HubError
from router.hub import failures
from router.hub.catalog import hub_model, license_of
from router.hub.conversion import convert
from router.hub.files import needed_files
from router.hub.store import PLAN_FILE, FileRecord, Origin, Plan, Store, check_file, now, read_plan, records_of
from router.hub.wishes import Progress, Tell, Wish, check_wish

disable_progress_bars()
# The library keeps a chunk in memory until it is whole; what was not written is lost with a broken connection.
constants.DOWNLOAD_CHUNK_SIZE = 64 * 1024

FILES_AT_ONCE = 4
PROGRESS_EVERY_S = 0.2
METADATA_TIMEOUT_S = 15.0
PART = ".part"


def fetch(wish: Wish, store: Store, tell: Tell = lambda progress: None) -> Path:
    """Have the model in the store; returns its folder. What is there already is kept unless `force` is set.

    Raises an error of ours, after which a second call goes on where this one stopped.
    """
    check_wish(wish)
    if store.has(wish.name) and not wish.force:
        tell(Progress(stage="ready"))
        return store.find(wish.name)
    tell(Progress(stage="looking"))
    with store.making(wish.name) as folder, failures.told(wish.id, wish.revision):
        return _fetch(wish, store, folder, tell)


def _fetch(wish: Wish, store: Store, folder: Path, tell: Tell) -> Path:
    model = hub_model(wish.id, wish.revision)
    origin = Origin(
        id=wish.id,
        revision=model.sha or "",
        files=needed_files(model),
        license=license_of(model.tags),
        downloaded_at=now(),
    )
    work = folder / "files"
    _start_or_resume(folder, work, Plan(wish=wish, revision=origin.revision))
    total = sum(file.size for file in origin.files)
    # A conversion holds source and result together.
    store.check_space(total * (2 if wish.quantize else 1) - _held(work, origin), wish.name)
    with _telling(tell, lambda: Progress(stage="downloading", done_bytes=_held(work, origin), total_bytes=total)):
        _download_all(wish.id, origin, work)
    for trash in work.glob(f"*{PART}"):
        trash.unlink()
    if wish.quantize is None:
        place = store.publish(work, wish.name, origin)
    else:
        tell(Progress(stage="converting", done_bytes=total, total_bytes=total))
        made = folder / "converted"
        convert(work, made, wish.quantize, wish.group_size)
        converted = msgspec.structs.replace(origin, form=wish.quantize, files=records_of(made))
        place = store.publish(made, wish.name, converted)
    store.forget_pending(folder)
    tell(Progress(stage="ready", done_bytes=total, total_bytes=total))
    return place


def _start_or_resume(folder: Path, work: Path, plan: Plan) -> None:
    """Keep what an earlier try of the same revision left; else begin anew."""
    earlier = read_plan(folder)
    if earlier is None or earlier.revision != plan.revision:
        Store.empty(work)
    for old in folder.iterdir():
        if old not in (work, folder / PLAN_FILE):
            Store.empty(old)
    work.mkdir(exist_ok=True)
    (folder / PLAN_FILE).write_bytes(msgspec.json.encode(plan))


def _download_all(model_id: str, origin: Origin, work: Path) -> None:
    """All files, several at a time, small ones first; the first error ends it."""
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="download")
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        stack.callback(stop.set)
        files = sorted(origin.files, key=lambda file: file.size)
        jobs = [pool.submit(_download_file, model_id, origin.revision, file, work, stop) for file in files]
        for job in concurrent.futures.as_completed(jobs):
            job.result()


class _Stopped(Exception):
    """Another file has failed."""


class _Sink(io.FileIO):
    """A file that grows at its end; it refuses to when the download is to stop."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path, "a+")
        self._stop = stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise _Stopped
        return super().write(data)


def _download_file(model_id: str, revision: str, file: FileRecord, work: Path, stop: threading.Event) -> None:
    done, part = work / file.name, work / f"{file.name}{PART}"
    if done.is_file():
        return
    url = hf_hub_url(model_id, file.name, revision=revision, endpoint=failures.endpoint())
    metadata = get_hf_file_metadata(url, timeout=METADATA_TIMEOUT_S, endpoint=failures.endpoint())
    headers = build_hf_headers()
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for where it sends us
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    with contextlib.suppress(_Stopped), _Sink(part, stop) as sink:
        http_get(
            metadata.location,
            cast(BinaryIO, sink),
            resume_size=part.stat().st_size,
            headers=headers,
            expected_size=file.size,
        )
    if stop.is_set():
        return
    if problem := check_file(part, file):
        part.unlink()
        raise HubError(f"{file.name} of {model_id} {problem.problem}: it was damaged on the way; try again")
    part.rename(done)


def _held(work: Path, origin: Origin) -> int:
    """Bytes that have come so far."""
    held = 0
    for file in origin.files:
        for name in (file.name, f"{file.name}{PART}"):
            with contextlib.suppress(OSError):
                held += (work / name).stat().st_size
                break
    return held


@contextlib.contextmanager
def _telling(tell: Tell, progress: Callable[[], Progress]) -> Iterator[None]:
    """Report now and then from a thread of its own, and once at the end."""
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(PROGRESS_EVERY_S):
            tell(progress())

    tell(progress())
    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tell(progress())
