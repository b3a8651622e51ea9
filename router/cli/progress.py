"""How far a download is: a bar on a terminal, a line now and then otherwise."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from router.cli.output import Output
from router.hub.wishes import Progress, Tell
from router.units import in_units

LINE_EVERY_S = 5.0


@contextlib.contextmanager
def showing(output: Output, name: str) -> Iterator[Tell]:
    """Gives the function that is told how far it is."""
    if output.is_json:
        yield lambda progress: None
    elif output.err.isatty():
        with _bars(output) as bars:
            yield _BarTeller(bars, name)
    else:
        yield _LineTeller(output, name)


def _bars(output: Output) -> Bars:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bars(*columns, console=Console(file=output.err), transient=True)


class _BarTeller:
    def __init__(self, bars: Bars, name: str) -> None:
        self._bars, self._name = bars, name
        self._task = bars.add_task(name, total=None)

    def __call__(self, progress: Progress) -> None:
        self._bars.update(
            self._task,
            description=f"{self._name}: {progress.stage}",
            completed=progress.done_bytes,
            total=progress.total_bytes or None,
        )


class _LineTeller:
    def __init__(self, output: Output, name: str) -> None:
        self._output, self._name = output, name
        self._stage, self._said_s = "", 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.stage == self._stage and now_s - self._said_s < LINE_EVERY_S:
            return
        self._stage, self._said_s = progress.stage, now_s
        size = f" {in_units(progress.done_bytes)} of {in_units(progress.total_bytes)}" if progress.total_bytes else ""
        self._output.note(f"{self._name}: {progress.stage}{size}")
