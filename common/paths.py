"""Where mlxspec keeps its state: everything lives under one folder, so that two servers can run side by side."""

import os
from pathlib import Path


def home() -> Path:
    """The state folder: `MLXSPEC_HOME`, or `~/.mlxspec`."""
    return Path(os.environ.get("MLXSPEC_HOME") or "~/.mlxspec").expanduser().absolute()


def models_dir() -> Path:
    """Model folders; each sub-folder with a config.json is served under its own name."""
    return home() / "models"


def drafts_dir() -> Path:
    """Trained draft heads; each folder's report.json names the `model` and says whether the head `is_used`."""
    return home() / "drafts"


def texts_dir() -> Path:
    """What models were asked and answered, where `keep_text` is set; a folder for each."""
    return home() / "texts"


def shipped_drafts_dir() -> Path:
    """Draft heads that come with mlxspec."""
    return Path(__file__).parents[1] / "worker" / "heads" / "shipped"


def logs_dir() -> Path:
    """One log file for the router and one for each model's worker."""
    return home() / "logs"


def run_dir() -> Path:
    """Sockets, lock and the effective configuration of the running server."""
    return home() / "run"


def ensure_private_dir(path: Path) -> Path:
    """Make `path` with mode 0700 (and put it back to that if it was wider); returns it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path
