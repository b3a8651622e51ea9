"""The error tree: each error finds its way over the wire by its code."""

import pytest

from common import errors
from common.errors import InternalError, MlxspecError, from_code


def tree(root: type[MlxspecError]) -> list[type[MlxspecError]]:
    return [root, *(leaf for branch in root.__subclasses__() for leaf in tree(branch))]


CLASSES = [kind for kind in tree(MlxspecError) if kind.__module__ == errors.__name__ and kind is not MlxspecError]


@pytest.mark.parametrize("kind", CLASSES)
def test_error_comes_back_from_its_code(kind: type[MlxspecError]) -> None:
    error = from_code(kind.code, "text", "field")
    assert type(error) is kind
    assert (error.message, error.param, str(error)) == ("text", "field", "text")


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(codes) == len(set(codes))


def test_unknown_code_is_an_internal_error() -> None:
    assert type(from_code("from_the_future", "text")) is InternalError


@pytest.mark.parametrize("kind", CLASSES)
def test_only_errors_that_pass_are_retryable(kind: type[MlxspecError]) -> None:
    assert kind.retryable == (kind.http_status in (429, 503, 504))
