"""Fixtures and marks that every test folder shares."""

import os
from pathlib import Path

import pytest

from common import paths

# Read once, before any test points MLXSPEC_HOME at a folder of its own: the model is built once per machine.
_MODELS_DIR = paths.models_dir()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder: tests/e2e is integration, everything else is unit."""
    e2e = Path(__file__).parent / "e2e"
    for item in items:
        item.add_marker(pytest.mark.integration if e2e in item.path.parents else pytest.mark.unit)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder: MLXSPEC_DEMO_MODEL, or the one under MLXSPEC_HOME, built if missing."""
    if given := os.environ.get("MLXSPEC_DEMO_MODEL"):
        return Path(given)
    # Imported here: it pulls mlx in, which most test folders do without.
    from worker.convert.demo_model import MODEL_NAME, build_demo_model

    return build_demo_model(_MODELS_DIR / MODEL_NAME)
