"""Requests of different API keys are kept apart in the worker."""

from aiohttp.test_utils import make_mocked_request

from router.generation import _scope


def test_a_key_makes_a_scope_that_does_not_tell_it() -> None:
    def scope(**headers: str) -> str:
        return _scope(make_mocked_request("POST", "/", headers={k.replace("_", "-"): v for k, v in headers.items()}))

    assert scope() == ""
    one, other = scope(Authorization="Bearer sk-1"), scope(Authorization="Bearer sk-2")
    assert one != other
    assert "sk-1" not in one
    assert scope(x_api_key="sk-3") not in ("", one, other)
    assert scope(Authorization="Bearer sk-1") == one
