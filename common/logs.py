"""Logging set-up of every process: one line an event, `time level process sentence key=value …` on standard error.

The supervisor points a child's standard error at its file under the logs folder, so that a native crash and a stack
dump land in the same place. Never a prompt's text, never a key; line breaks are escaped.
"""

import faulthandler
import logging
import sys
from typing import TextIO


class _OneLine(logging.Formatter):
    """Keeps a message on one line; only a traceback takes more."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = record.getMessage().replace("\r", "\\r").replace("\n", "\\n"), None
        return super().format(record)


def setup(process: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all records of this process to `stream` (default: standard error); `process` names it."""
    faulthandler.enable(stream or sys.stderr)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)-7s {process}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("aiohttp.access", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def fields(**values: object) -> str:
    """`key=value …` for the end of a log sentence; values with blanks are quoted."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in values.items() if value is not None)


def _quoted(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return repr(text) if not text or any(c.isspace() for c in text) else text
