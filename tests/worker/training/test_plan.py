"""Numbers that a build cannot go on with are refused before anything is loaded, in one line."""

import math
from pathlib import Path

import msgspec
import pytest

from tests.worker.training import language
from worker.training import __main__ as command
from worker.training.plan import HELP, RANGES, BadPlan, Plan, check, fitted, row_bytes


@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range_is_named_with_its_limits(name: str) -> None:
    least, most = RANGES[name]
    for value in (least - 1, most + 1, math.nan):
        with pytest.raises(BadPlan, match=rf"^--{name.replace('_', '-')} is .*it must lie in \["):
            check(msgspec.structs.replace(Plan(), **{name: value}))
    check(msgspec.structs.replace(Plan(), **{name: type(getattr(Plan(), name))(most)}))


def test_every_number_of_a_plan_has_a_range_and_is_explained() -> None:
    assert set(RANGES) == set(HELP) == set(Plan.__struct_fields__) - {"stages", "init"}


def sizes(plan: Plan, weights_bytes: int = 0, context_tokens: int = 2048) -> tuple[int, int, int]:
    found = fitted(plan, language.untrained(), weights_bytes, context_tokens)
    return found.rows, found.length, found.batch_rows


def test_what_a_plan_leaves_open_suits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(Plan()) == (16, 256, 4)
    monkeypatch.setattr("worker.backend.name", lambda: "cuda")
    row = row_bytes(language.untrained(), 768)
    for rows_that_fit, expected in ((5000, 1024), (700, 512), (512, 512), (40, 32), (3, 16)):
        monkeypatch.setattr("worker.backend.memory_bytes", lambda rows=rows_that_fit: 2 * (rows * row + 1_000_000))
        assert sizes(Plan(), weights_bytes=1_000_000) == (expected, 768, 8)
    assert sizes(Plan(rows=7, batch_rows=2), context_tokens=512) == (7, 512, 2)
    assert sizes(Plan(rows=7, length=384)) == (7, 384, 8)


def test_a_row_takes_what_its_layers_keep_of_each_token() -> None:
    model = language.untrained()
    config = language.CONFIG
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    assert row_bytes(model, 700) == 768 * per_token


def test_a_bad_number_ends_the_command_before_the_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--minutes=0", "--", "no-such-model"]) == command.CANNOT
    assert capsys.readouterr().err == "mlxspec draft: --minutes is 0.0; it must lie in [0.01, 10,080]\n"


@pytest.mark.parametrize(("content", "says"), [(b"\n \n", "has no prompts"), (b"\xff\xfe", "is not text in UTF-8")])
def test_a_file_without_prompts_is_refused(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert command.main(["build", f"--prompts={file}", "--", "no-such-model"]) == command.CANNOT
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
