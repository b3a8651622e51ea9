"""What a verb prints: rich on a terminal, plain lines otherwise, JSON on request; and what its exit code means."""

import enum
import json
import sys
from collections.abc import Sequence
from typing import IO, Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ConfigError, InvalidRequest, MlxspecError, NotFound

WIDEST = 1000  # characters of a table's line


class ExitStatus(enum.IntEnum):
    """Exit codes of `mlxspec`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 3
    NO_SERVER = 4
    NOT_FOUND = 5
    INTERRUPTED = 130


class NoServer(MlxspecError):
    """No server answers where one was looked for."""

    code = "no_server"
    http_status = 503


_STATUSES: tuple[tuple[type[MlxspecError], ExitStatus], ...] = (
    (ConfigError, ExitStatus.CONFIG),
    (NoServer, ExitStatus.NO_SERVER),
    (NotFound, ExitStatus.NOT_FOUND),
    (InvalidRequest, ExitStatus.USAGE),
)


def status_of(error: MlxspecError) -> ExitStatus:
    """The exit code of an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), ExitStatus.FAILED)


class Output:
    """Results go to standard output, notes, progress and errors to standard error."""

    def __init__(self, *, is_json: bool = False, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.is_json = is_json
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.is_terminal = self.out.isatty() and not is_json
        self.console = Console(file=self.out, highlight=False)

    def json(self, value: Any) -> None:
        """A result as JSON, one document."""
        plain = msgspec.to_builtins(value)
        print(json.dumps(plain, indent=2, ensure_ascii=False), file=self.out)

    def line(self, text: str = "", style: str = "") -> None:
        """One line of a result; `style` counts on a terminal only."""
        if self.is_terminal:
            self.console.print(f"[{style}]{escape(text)}[/]" if style else escape(text), soft_wrap=True)
        else:
            print(text, file=self.out)

    def write(self, text: str) -> None:
        """Text as it comes, without a line's end."""
        print(text, end="", file=self.out, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned on a terminal, names whole; else one line a row, its cells parted by tabs, without a head."""
        if not self.is_terminal:
            for row in rows:
                print("\t".join(row), file=self.out)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        # Names stay whole, for copying: the terminal itself breaks lines that are too long for it.
        Console(file=self.out, width=WIDEST, highlight=False).print(table)

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values, one pair a line."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.line(f"{name:<{width}}  {value}")

    def note(self, text: str) -> None:
        """What goes on meanwhile, for the eye: on standard error."""
        print(text, file=self.err)

    def error(self, error: MlxspecError) -> None:
        """One line on standard error; with --json the error as JSON on standard output."""
        if self.is_json:
            self.json({"error": {"code": error.code, "message": error.message}})
        else:
            print(f"mlxspec: {error.message}", file=self.err)
