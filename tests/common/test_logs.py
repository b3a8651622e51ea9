"""Log lines: one line an event, whatever is in it."""

import io
import logging
from collections.abc import Iterator

import pytest

from common import logs


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_line_breaks_are_escaped(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("logs") / "x.log"
    with path.open("w") as stream:
        logs.setup("test", "info", stream)
        logging.getLogger("x").info("two\nlines\r%s", "more\nlines")
        logging.getLogger("x").debug("not this")
    (line,) = path.read_text().splitlines()
    assert line.endswith(r"INFO    test: two\nlines\rmore\nlines")


def test_fields_are_quoted_where_they_have_blanks() -> None:
    assert logs.fields(a=1, b="x y", c=None, d=0.12345, e="") == "a=1 b='x y' d=0.123 e=''"


def test_formatter_keeps_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs._OneLine("%(message)s"))
    logger = logging.getLogger("with-traceback")
    logger.addHandler(handler)
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("outer\nline")
    assert r"outer\nline" in stream.getvalue()
    assert "ValueError: inner" in stream.getvalue()
