"""Numbers that a build cannot go on with are refused before anything is loaded, in one line."""

import math
from pathlib import Path

import msgspec
import pytest

from worker.training import __main__ as command
from worker.training.plan import RANGES, BadPlan, Plan, check


@pytest.mark.parametrize("name", RANGES)
def test_a_number_outside_its_range_is_named_with_its_limits(name: str) -> None:
    least, most = RANGES[name]
    for value in (least - 1, most + 1, math.nan):
        with pytest.raises(BadPlan, match=rf"^--{name.replace('_', '-')} is .*it must lie in \["):
            check(msgspec.structs.replace(Plan(), **{name: value}))
    check(msgspec.structs.replace(Plan(), **{name: type(getattr(Plan(), name))(most)}))


def test_every_number_of_a_plan_has_a_range() -> None:
    assert set(RANGES) == set(Plan.__struct_fields__) - {"stages", "init"}


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
