"""What a report shows to people."""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from worker.heads import folder
from worker.training import report
from worker.training.plan import Plan
from worker.training.report import Spent
from worker.training.trainer import Point, Progress

CURVE = [Point(30.0, 100_000, 1.5), Point(60.0, 300_000, 2.0)]


def test_the_picture_shows_the_curve_against_minutes_and_against_tokens() -> None:
    root = ElementTree.fromstring(report.picture(CURVE, "a<b"))
    lines = [element.attrib["points"].split() for element in root.iter() if element.tag.endswith("polyline")]
    by_minutes, by_tokens = [[tuple(map(float, place.split(","))) for place in line] for line in lines]
    assert [y for _, y in by_minutes] == [y for _, y in by_tokens]  # the same lengths
    assert by_minutes[0][1] > by_minutes[1][1]  # the longer one is higher up
    half, third = (line[0][0] - start for line, start in ((by_minutes, 48), (by_tokens, 528)))
    assert abs(half - 384 / 2) < 0.1 and abs(third - 384 / 3) < 0.1
    text = "".join(root.itertext())
    assert "1 minutes of training" in text and "0.3 million tokens trained on" in text


def test_history_tells_where_the_time_went() -> None:
    shipped = report.load(folder.SHIPPED / "smollm2-135m")
    spent = Spent(writing_s=10.0, reading_s=30.0, passes_s=50.0, judging_s=6.0, measuring_s=4.0)
    lines = report.history(msgspec.structs.replace(shipped, curve=CURVE, spent=spent)).splitlines()
    assert lines[2].split() == ["60.0", "300000", "2.00"]
    assert [line.split() for line in lines[-5:-3]] == [["writing", "10.0", "10%"], ["reading", "30.0", "30%"]]
    first = msgspec.structs.replace(spent, making_s=100.0)
    lines = report.history(msgspec.structs.replace(shipped, spent=first)).splitlines()
    assert ["making", "100.0", "50%"] in [line.split() for line in lines]


def test_reading_is_estimated_from_its_timings_and_never_more_than_the_training() -> None:
    assert Progress(step=10, train_s=5.0, readings_s=[0.1, 0.3]).reading_s == 2.0
    assert Progress(step=100, train_s=5.0, readings_s=[0.1]).reading_s == 5.0
    assert Progress(step=100, train_s=5.0).reading_s == 0.0


def like(kind: str, minutes: float, speedups: list[float], device: str = "cpu") -> report.Report:
    shipped = report.load(folder.SHIPPED / "smollm2-135m")
    return msgspec.structs.replace(
        shipped,
        plan=Plan(init=kind),
        others=[],
        writing_s=20 * minutes,
        train_s=40 * minutes,
        measured_on=device,
        measured=msgspec.structs.replace(shipped.measured, speedups=speedups),
    )


def test_the_faster_one_wins_and_unequal_times_are_told() -> None:
    head = report.figures(like("head", 5.0, [1.4, 1.2, 1.1]), "mine")
    layers = msgspec.structs.replace(like("layers", 5.0, [1.1, 1.3, 1.3]), others=[head])
    assert report.comparison(layers, "mine-layers").splitlines()[-1] == "mine (head) wins, at equal time"
    longer = msgspec.structs.replace(like("layers", 9.0, [1.5, 1.5, 1.5]), others=[head])
    last = report.comparison(longer, "mine-layers").splitlines()[-1]
    assert last == "mine-layers (layers) wins, at unequal times"
    elsewhere = msgspec.structs.replace(like("layers", 5.0, [1.0], "gpu"), others=[head])
    last = report.comparison(elsewhere, "mine-layers").splitlines()[-1]
    assert last == "mine (head) wins, at equal time, measured on different devices"
    assert report.comparison(like("head", 5.0, [1.0]), "mine") == ""


def test_drafters_without_a_readable_report_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    shipped = folder.SHIPPED / "smollm2-135m"
    target = folder.read_config(shipped).target
    for name in ("copy", "bare"):
        shutil.copytree(shipped, folder.heads_dir() / name)
    (folder.heads_dir() / "bare" / folder.REPORT).unlink()
    found = report.others(target, own=shipped)
    assert [(one.name, one.kind) for one in found] == [("copy", "head")]
    assert report.others("another", own=shipped) == []
