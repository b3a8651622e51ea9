"""The worker from the shell: one model, no server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import TOP

MODEL = "smollm2-135m"
BAD_MODEL = 3
CAPITAL = ["--prompt", "What is the capital of France?", "--temperature", "0"]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def home(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with the demo model under its name: the real one, whose step times are known, if that has it."""
    if demo_model.parts[-2:] == ("models", MODEL):
        return demo_model.parents[1]
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / MODEL).symlink_to(demo_model)
    return home


def run_worker(home: Path, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"MLXSPEC_HOME": str(home), "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-P", "-m", "worker", *arguments]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, check=False, timeout=110)


def answer(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """The one JSON object that `--json` prints."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_json_has_text_and_figures_and_the_trace_every_step(home: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    got = answer(run_worker(home, MODEL, *CAPITAL, "--json", "--trace", str(trace)))
    assert got["text"] == ANSWER
    assert got["finish_reason"] == "stop"
    assert got["time_to_first_token_s"] > 0
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, got["steps"] + 1))
    gains = [gain for step in steps for gain in step["gains"]]
    assert sum(len(gain["tokens"]) for gain in gains) == got["completion_tokens"]
    assert sum(gain["accepted"] for gain in gains) == got["accepted"]
    assert gains[-1]["finish"] == "stop"
    assert steps[0]["prefill_tokens"] == got["prompt_tokens"]


def test_no_speculation_gives_the_same_text_one_token_a_step(home: Path) -> None:
    got = answer(run_worker(home, MODEL, *CAPITAL, "--json", "--no-speculation"))
    assert got["text"] == ANSWER
    assert (got["drafted"], got["accepted"], got["acceptance_rate"]) == (0, 0, None)
    assert got["steps"] == got["completion_tokens"]


def test_messages_file_is_answered_with_a_table_of_figures(home: Path, tmp_path: Path) -> None:
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "user", "content": CAPITAL[1]}]))
    done = run_worker(home, MODEL, "--messages", str(messages), "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ANSWER}\n"
    for figure in ("tokens per step", "drafted", "accepted", "verify ms per step", "tokens per second"):
        assert figure in done.stderr


def test_repl_answers_two_turns_and_remembers_the_first(home: Path) -> None:
    turns = f"{CAPITAL[1]}\nSay that again.\n/quit\n"
    done = run_worker(home, MODEL, "--repl", "--temperature", "0", "--max-tokens", "24", stdin=turns)
    assert done.returncode == 0, done.stderr
    first, second = [text for text in done.stdout.split("> ") if text.strip()]
    assert first.strip() == ANSWER
    assert "Paris" in second
    assert done.stderr.count("tokens/s") == 2


@pytest.mark.parametrize("model", ["/nonexistent/model", "no-such-model"])
def test_bad_model_is_one_line_and_exit_code_3(home: Path, model: str) -> None:
    done = run_worker(home, model, *CAPITAL)
    assert (done.returncode, done.stdout) == (BAD_MODEL, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mlxspec-worker: ")
    assert model in line


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read"), ("{", "JSON list"), ("[]", "no messages")])
def test_unusable_messages_file_is_one_line_and_exit_code_3(
    home: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "messages.json"
    if content is not None:
        file.write_text(content)
    done = run_worker(home, MODEL, "--messages", str(file))
    assert (done.returncode, done.stdout) == (BAD_MODEL, "")
    (line,) = done.stderr.splitlines()
    assert str(file) in line
    assert said in line
