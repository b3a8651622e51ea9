"""`mlxspec draft` from a model's folder to a head in use: real processes, on a model that is made on the spot."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from common import openblas
from common.config import Config, ModelConfig
from common.sampling import Sampling, Speculation
from tests.e2e.server import wait_until
from tests.worker import tiny
from tests.worker.training import language
from worker import loader
from worker.assemble import assemble
from worker.drafters.chain import ChainDrafter
from worker.drafters.controller import Controller
from worker.heads import folder
from worker.heads.healed import HealedLayers
from worker.heads.identity import identity
from worker.kept_text import KeptText
from worker.request import Request
from worker.training import report
from worker.training.acceptance import Counts, count, right_drafts, walk
from worker.training.answers import answers
from worker.training.plan import compute_form
from worker.training.reading import Reader
from worker.training.report import Report
from worker.training.trainer import Progress, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}  # several only wait for each other over matrices as small as these
STEPS, ANSWERED, SERVED_ROWS = 200, 10, 20
SETTINGS = ("--minutes=5", f"--steps={STEPS}", "--tokens=6000", "--rows=64", "--length=64", "--batch-rows=8")


@dataclass(frozen=True, slots=True)
class Built:
    """A build that was killed twice: what was there at the second time, what the last run printed and returned."""

    home: Path
    head: Path
    at_kill: Progress
    rounds_at_kill: int
    told_of_kill: str
    status: int
    printed: str
    report: Report


def write_model(to: Path) -> None:
    """The model that knows the made-up language; it learns in a child, which has the fast BLAS."""
    subprocess.run(
        [sys.executable, "-m", language.__name__, str(to)],
        env=openblas.with_preload() | ONE_THREAD,
        check=True,
        timeout=100,
    )


def start(home: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "router.cli", "draft", *words],
        env=os.environ | ONE_THREAD | {"MLXSPEC_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(home: Path, *words: str) -> tuple[int, str, str]:
    process = start(home, *words)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def child_of(process: "subprocess.Popen[str]") -> psutil.Process:
    return wait_until(psutil.Process(process.pid).children, "the child's start", 30)[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / "tiny")
    prompts = home / "prompts.txt"
    sentences = language.sentences(np.random.default_rng(9), 8, 8)[:, 1:]
    prompts.write_text("\n".join(" ".join(f"w{token}" for token in row) for row in sentences))
    training = home / "training.jsonl"
    training.write_text("".join(json.dumps({"turns": [f"w{n} w{n + 1}"]}) + "\n" for n in range(2, 2 + ANSWERED)))
    kept = KeptText(home / "texts" / "tiny")
    for row in language.sentences(np.random.default_rng(11), SERVED_ROWS, 48).tolist():
        kept.keep(row[:8], row[8:])
    head = home / "drafts" / "tiny"
    text = ("--prompts", str(prompts), "--training-prompts", str(training), "--served")
    build = ("build", "tiny", *SETTINGS, *text)

    with start(home, *build) as process:  # the command is killed, and its child ends with it
        wait_until(lambda: list(head.glob("work/corpus-*.npz")), "a round of writing", 60)
        child = child_of(process)
        process.kill()
        child.wait(20)

    with start(home, *build) as process:  # the child is killed in training
        child, state = child_of(process), head / "work" / "state.safetensors"
        wait_until(state.is_file, "a checkpoint", 60)
        child.send_signal(signal.SIGKILL)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 1
    at_kill = msgspec.json.decode(load_checkpoint(state)[1]["progress"], type=Progress)
    assert (head / "work").stat().st_mode & 0o777 == 0o700
    rounds = len(list(head.glob("work/corpus-*.npz")))

    status, printed, errors = finished(home, *build)
    assert status in (0, 1), errors
    yield Built(home, head, at_kill, rounds, told, status, printed, report.load(head))


def test_a_killed_build_goes_on_from_its_checkpoint(built: Built) -> None:
    assert 0 < built.at_kill.step < STEPS
    assert "ended by signal 9" in built.told_of_kill and "goes on where it was" in built.told_of_kill
    points = len(built.at_kill.curve)
    assert points >= 1 and built.report.curve[:points] == built.at_kill.curve
    assert built.report.steps == STEPS and len(built.report.curve) == 10
    assert built.rounds_at_kill >= 1 and "writing:" not in built.printed
    assert not (built.head / "work").exists()


def test_given_prompts_and_kept_text_are_trained_on(built: Built) -> None:
    assert (built.report.answered_prompts, built.report.served_rows) == (ANSWERED, SERVED_ROWS)
    assert built.report.spent is not None and built.report.spent.reading_s > 0
    assert 0 < built.report.spent.making_s < built.report.train_s


def test_the_command_tells_by_its_exit_code_whether_the_head_is_used(built: Built) -> None:
    assert built.status == (0 if built.report.is_used else 1)
    assert built.report.is_used == (max(built.report.measured.speedups) >= 1.05)
    assert (built.head / report.PICTURE).read_text().startswith("<svg")
    assert "predicted speed-up" in built.printed


def test_the_head_guesses_more_of_the_models_text_than_copying_does(built: Built) -> None:
    model = loader.load(str(built.home / "models" / "tiny"), "float32")
    head = folder.load(built.head, identity(model.model, model.config), model.model, compute_form())
    prompts = [[1, *map(int, row)] for row in language.sentences(np.random.default_rng(21), 16, 6)[:, 1:]]
    reader = Reader(model.model, head)
    by_head, by_copies = Counts(5), Counts(5)
    for group in answers(model.model, prompts, 0.7, 96, frozenset(), seed=4):
        right = right_drafts(head, reader, group, 5)
        for i, row in enumerate(group.tokens.tolist()):
            span = int(group.starts[i]), int(group.ends[i])
            by_head.accepted += walk(right[:, i], row, *span, 5)
            by_copies.accepted += walk(np.zeros_like(right[:, i]), row, *span, 5, copied=5)
    reader.close()
    assert by_head.accept_length > 1.25 * by_copies.accept_length


@pytest.fixture(scope="module")
def healed(built: Built) -> tuple[Path, str]:
    """A build of healed layers for the same model: its folder, and what it printed."""
    settings = (
        "--keep-ratio=0.25",
        "--minutes=5",
        "--steps=40",
        "--tokens=3000",
        "--rows=64",
        "--length=64",
        "--batch-rows=8",
    )
    prompts = str(built.home / "prompts.txt")
    status, printed, errors = finished(built.home, "build", "tiny", "--init=layers", *settings, "--prompts", prompts)
    assert status in (0, 1), errors
    return built.home / "drafts" / "tiny-layers", printed


def test_healed_layers_guess_more_than_they_did_before(built: Built, healed: tuple[Path, str]) -> None:
    model = loader.load(str(built.home / "models" / "tiny"), "float32")
    own = identity(model.model, model.config)
    after = folder.load_layers(healed[0], own, model.model, compute_form())
    before = HealedLayers(after.config, after.vocabulary, model.model)
    prompts = [[1, *map(int, row)] for row in language.sentences(np.random.default_rng(21), 16, 6)[:, 1:]]
    text = answers(model.model, prompts, 0.7, 64, frozenset(), seed=4)
    lengths = []
    for layers in (before, after):
        reader = Reader(model.model, layers)
        lengths.append(count(layers, reader, text, 5)[0].accept_length)
        reader.close()
    assert lengths[1] > 1.1 * lengths[0]


def test_a_report_compares_with_the_models_other_drafters(healed: tuple[Path, str]) -> None:
    made = report.load(healed[0])
    (head,) = made.others
    assert (head.name, head.kind) == ("tiny", "head") and head.minutes > 0
    (told,) = [line for line in healed[1].splitlines() if "wins" in line]
    assert told.startswith(("tiny (head)", "tiny-layers (layers)"))


def test_a_model_with_a_head_and_healed_layers_says_what_it_says_without(
    built: Built, healed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (built.head, healed[0]):  # without reports, which may advise against them
        shutil.copytree(source, tmp_path / "drafts" / source.name, ignore=shutil.ignore_patterns("report.*"))
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    path = str(built.home / "models" / "tiny")
    engine = assemble(path, Config(), ModelConfig(path=path)).engine
    engine.times, engine.drafting.controller = tiny.flat_times(), Controller()  # that drafts pay is not the question
    for drafter in (engine.drafting.drafters["head"], engine.drafting.drafters["layers"]):
        assert isinstance(drafter, ChainDrafter)
        drafter.times = tiny.cheap_times()
    outputs, drafted = {}, {}
    for name in ("none", "head", "layers"):
        speculation = Speculation(drafter=name)
        before = engine.totals.drafted
        prompts = [(1, 5 + i, 9) for i in range(3)]
        requests = [Request(f"r{i}", p, Sampling(), 40, speculation=speculation) for i, p in enumerate(prompts)]
        outputs[name] = tiny.finish(engine, requests)
        drafted[name] = engine.totals.drafted - before
    assert outputs["head"] == outputs["layers"] == outputs["none"]
    assert drafted["none"] == 0 and drafted["head"] > 0 and drafted["layers"] > 0


def test_a_head_is_listed_shown_and_deleted(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.head, tmp_path / "drafts" / "mine")
    status, out, _ = finished(tmp_path, "list", "--json")
    mine: dict[str, Any] = next(head for head in json.loads(out) if head["name"] == "mine")
    assert status == 0 and mine["is_used"] == built.report.is_used
    status, out, _ = finished(tmp_path, "info", "mine", "--json")
    assert status == 0 and json.loads(out)["report"]["steps"] == STEPS
    status, out, _ = finished(tmp_path, "rm", "mine", "--json")
    assert status == 0 and json.loads(out)["is_deleted"]
    assert not (tmp_path / "drafts" / "mine").exists()


def test_a_head_is_not_measured_on_another_model(built: Built) -> None:
    shipped = "smollm2-135m"
    status, _, err = finished(built.home, "eval", shipped, "--model", str(built.home / "models" / "tiny"))
    assert status == 3
    assert "made for another model" in err


def test_a_head_that_is_not_there_is_exit_code_5_and_a_model_that_is_not_there_3(tmp_path: Path) -> None:
    for words, says, code in (
        (("rm", "none"), "no head named none", 5),
        (("build", "none"), "none is not a model folder", 3),
    ):
        status, _, err = finished(tmp_path, *words)
        assert status == code
        (line,) = err.splitlines()
        assert says in line
    assert not (tmp_path / "drafts").exists()
