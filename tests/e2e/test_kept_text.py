"""`keep_text` through a whole server: what one model is asked and answers is kept, and nothing of another."""

from pathlib import Path

import pytest

from tests.e2e.server import Serve, wait_until
from tests.e2e.tiny_model import write_model
from worker import kept_text

pytestmark = pytest.mark.timeout(180)


def test_text_is_kept_of_the_model_that_is_told_to_and_of_no_other(demo_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("kept", "other")):
        write_model(tmp_path / name, demo_model, seed)
    config = (
        "".join(f'[models.{name}]\npath = "{tmp_path / name}"\n' for name in ("other", "kept")) + "keep_text = true\n"
    )
    serve = Serve(tmp_path / "kept", config)
    try:
        serve.wait_ready()
        for name in ("other", "kept"):
            body = {"model": name, "prompt": "blue green red", "raw": True, "max_tokens": 7, "temperature": 0}
            status, answer = serve.request("POST", "/generate", body)
            assert status == 200, answer
        texts = serve.home / "texts"
        (one,) = wait_until(lambda: list(kept_text.conversations(texts / "kept")), "text", 10)
        assert len(one.prompt) >= 3 and len(one.answer) == 7
        assert [path.name for path in texts.iterdir()] == ["kept"]
        assert (texts / "kept" / kept_text.NEWER).stat().st_mode & 0o777 == 0o600
    finally:
        serve.close()
