"""What the person at the terminal reads."""

import io

import pytest

from common.config import ServerConfig
from common.messages import ModelEntry, ModelFacts, ModelTable
from common.states import WorkerState
from router.supervisor import console
from router.supervisor.console import Console

S = WorkerState
FACTS = ModelFacts(
    architecture="llama",
    context_tokens=8192,
    vocabulary=10,
    weights_dtype="float32",
    weights_bytes=1,
    kv_bytes_per_token=1,
    backend="OpenBLAS",
    has_chat_template=True,
    drafters=(),
    load_s=3.21,
)


def table(state: WorkerState, detail: str = "", restarts: int = 0, retry_after_s: float | None = None) -> ModelTable:
    entry = ModelEntry(
        name="m",
        path="/m",
        state=state,
        detail=detail,
        restarts=restarts,
        retry_after_s=retry_after_s,
        facts=FACTS,
    )
    return ModelTable(revision=1, default_model="m", memory_budget_bytes=1, models=(entry,))


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (None, table(S.STOPPED), []),
        (None, table(S.STARTING), ["loading model m from /m …"]),
        (table(S.STARTING), table(S.LOADING), []),
        (
            table(S.LOADING),
            table(S.READY),
            ["m ready in 3.2 s (float32, OpenBLAS, context 8192 tokens)"],
        ),
        (table(S.READY), table(S.READY), []),
        (
            table(S.READY),
            table(S.STARTING, "was killed by SIGKILL", restarts=1),
            ["m died: was killed by SIGKILL; starting it again (restart 1)"],
        ),
        (
            table(S.LOADING),
            table(S.BACKOFF, "boom", retry_after_s=2.5),
            ["m died: boom; next try in 2.5 s"],
        ),
        (table(S.LOADING), table(S.FAILED, "no config"), ["m cannot be loaded: no config"]),
        (table(S.READY), table(S.DRAINING), ["m finishes its requests and is unloaded"]),
        (table(S.DRAINING), table(S.STOPPED), ["m is unloaded"]),
    ],
)
def test_one_line_for_each_change(before: ModelTable | None, after: ModelTable, lines: list[str]) -> None:
    assert console.news(before, after) == lines


def test_address_and_three_things_to_try() -> None:
    text = "\n".join(console.first_steps(ServerConfig(port=8123), "m"))
    assert "http://127.0.0.1:8123" in text
    assert text.count("  curl ") == 3
    assert "curl -N" in text


def test_without_a_model_it_says_how_to_get_one() -> None:
    assert "--model-path" in "\n".join(console.first_steps(ServerConfig(), None))


def test_ipv6_address_has_brackets() -> None:
    assert console.address(ServerConfig(host="::1")) == "http://[::1]:8000"


def test_closed_terminal_is_no_error() -> None:
    stream = io.StringIO()
    teller = Console(stream)
    teller.show(table(S.STARTING))
    stream.close()
    teller.show(table(S.FAILED))
