"""A hub with tiny checkpoints of four families, and a state folder of its own for each test."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.hub.store import Store
from tests.hub.fake_hub import FakeHub


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of each family."""
    from tests.hub.checkpoints import KINDS, make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        make_checkpoint(kind, root / kind)
    return root


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """MLXSPEC_HOME, and a Hugging Face home beside it: no token or cache of the machine is used."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("MLXSPEC_HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("MODEL_PATH", raising=False)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def hub(checkpoints: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with acme/tiny-KIND for each family, at HF_ENDPOINT."""
    hub = FakeHub()
    for number, folder in enumerate(sorted(checkpoints.iterdir())):
        hub.add(f"acme/tiny-{folder.name}", folder, downloads=100 - number)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def store(home: Path) -> Store:
    return Store()
