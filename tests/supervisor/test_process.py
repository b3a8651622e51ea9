"""Children: how they are started, what their logs tell, how they end."""

import asyncio
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from common import lifeline
from router.supervisor import process
from router.supervisor.model import slug
from router.supervisor.process import Child, Commands, Lifeline, WorkerLaunch
from tests.supervisor.harness import wait_until

SHOW = "import os, sys; print(sys.argv[1:], os.environ['MLXSPEC_TOKEN'], os.getpgrp() == os.getpid())"


async def spawn(script: str, log_path: Path, line: Lifeline) -> Child:
    launch = WorkerLaunch(identity="m#1", name="m", path="/m", run_dir=Path("/run"), token="secret", log_path=log_path)
    return await process.spawn_worker(Commands(worker=(sys.executable, "-c", script)), launch, line)


@pytest.fixture
def line() -> Lifeline:
    return Lifeline()


async def test_worker_gets_its_arguments_token_and_own_group(tmp_path: Path, line: Lifeline) -> None:
    child = await spawn(SHOW, tmp_path / "logs" / "w.log", line)
    assert await child.wait() == 0
    expected = "['--identity', 'm#1', '--name', 'm', '--model', '/m', '--run-dir', '/run'] secret True\n"
    assert (tmp_path / "logs" / "w.log").read_text() == expected
    assert stat.S_IMODE((tmp_path / "logs" / "w.log").stat().st_mode) == 0o600
    line.close()


async def test_child_sees_the_end_of_its_lifeline(tmp_path: Path, line: Lifeline) -> None:
    wait = f"import os; print('up', flush=True); os.read(int(os.environ['{lifeline.VARIABLE}']), 1)"
    child = await spawn(wait, tmp_path / "w.log", line)
    waiting = asyncio.create_task(child.wait())
    assert (await asyncio.wait([waiting], timeout=0.3))[1]
    line.close()
    assert await asyncio.wait_for(waiting, 5) == 0


async def test_kill_ends_the_whole_group(tmp_path: Path, line: Lifeline) -> None:
    script = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    child = await spawn(script, tmp_path / "w.log", line)
    text = await asyncio.to_thread(wait_until, (tmp_path / "w.log").read_text, "grandchild")
    child.kill()
    code = await child.wait()
    assert (code, child.describe_exit(code)) == (-signal.SIGKILL, "was killed by SIGKILL")
    await asyncio.to_thread(wait_until, lambda: not is_running(int(text)), "end of the grandchild")
    child.kill()
    child.terminate()
    line.close()


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_program_that_is_not_there_is_an_os_error(tmp_path: Path, line: Lifeline) -> None:
    launch = WorkerLaunch("m#1", "m", "/m", Path("/run"), "t", tmp_path / "w.log")
    with pytest.raises(OSError):
        await process.spawn_worker(Commands(worker=("/no/such/program",)), launch, line)
    line.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("{AT} INFO    worker m: all is well\n", ""),
        ("{AT} ERROR   worker m: no such: file\n", "no such: file"),
        (
            "{AT} ERROR   worker m: first\n{AT} CRITICAL worker m: second\n",
            "second",
        ),
        ("{AT} ERROR   worker m: cause\nTraceback:\n  at\nValueError: effect\n", "cause"),
        (
            "{AT} INFO    worker m: up\nTraceback:\n  at\nValueError: effect\n\n",
            "ValueError: effect",
        ),
        ("worker: error: no such option\n", "worker: error: no such option"),
        ("x" * 1000, "x" * process.MAX_DETAIL_CHARS),
        ("é" * 20_000 + "\nend\n", "end"),
    ],
)
def test_last_error_of_a_log(tmp_path: Path, text: str, expected: str) -> None:
    text = text.replace("{AT}", "2026-01-01 00:00:00,000")
    (tmp_path / "w.log").write_text("earlier life\n" + text)
    assert process.last_error(tmp_path / "w.log", len("earlier life\n")) == expected


def test_no_log_no_error(tmp_path: Path) -> None:
    assert process.last_error(tmp_path / "nothing.log") == ""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-200, "was killed by signal 200"),
    ],
)
def test_exit_code_in_words(code: int, text: str) -> None:
    assert process.exit_text(code) == text


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2", "a"])
def test_plain_name_is_its_own_slug(name: str) -> None:
    assert slug(name) == name


def test_other_names_get_safe_and_different_slugs() -> None:
    names = ["org/model", "org-model", "Org-Model", "org model", "../../etc", "", "#1", "模型", "x" * 300]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    for text in slugs:
        assert text.isascii()
        assert not set(text) & set("/# \0")
        assert not text.startswith(".")
        assert len(text) < 80
