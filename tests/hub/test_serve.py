"""`mlxspec serve` with models of the hub: fetched before the server starts, if they are loaded at the start."""

from pathlib import Path

import pytest

from common.config import first_models, load
from router.cli.main import main
from tests.hub.fake_hub import FakeHub

CONFIG = """
default_model = "far"
[models.far]
path = "acme/tiny-llama"
[models.later]
path = "acme/none"
[models.kept]
path = "acme/absent"
pin = true
"""


@pytest.fixture
def config(home: Path) -> Path:
    (home / "config.toml").write_text(CONFIG)
    return home / "config.toml"


def test_default_and_kept_models_are_the_first(config: Path) -> None:
    assert list(first_models(load(config))) == ["far", "kept"]


def test_first_models_are_fetched_and_the_rest_is_not(
    config: Path, home: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--config", str(config)]) == 5
    assert "acme/absent is not on" in capsys.readouterr().err.splitlines()[-1]
    assert (home / "models" / "acme" / "tiny-llama" / "config.json").is_file()
    assert not any("acme/none" in path for _, path, _ in hub.requests)
    assert not (home / "run").exists()  # nothing was started
