"""Step times: prediction, refresh, persistence."""

from pathlib import Path

import numpy as np
import pytest

from worker import step_times
from worker.cache.layout import StepSizes
from worker.step_times import GRID, StepTimes
from worker.time_factors import Kind


def linear() -> StepTimes:
    return StepTimes([0.05 + 0.001 * n for n in GRID])


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 512, 2000])
def test_predicts_between_and_beyond_what_was_measured(tokens: int) -> None:
    assert linear().predict(tokens) == pytest.approx(0.05 + 0.001 * tokens)


def test_predicts_many_as_one() -> None:
    times = linear()
    times.seconds[3], times.seconds[-1] = 9.0, None
    times.observe(8, 0.1)
    tokens = np.arange(1, 900)
    assert times.predict_all(tokens) == pytest.approx([times.predict(n) for n in tokens.tolist()])
    assert StepTimes([0.2, *[None] * (len(GRID) - 1)]).predict_all(tokens) == pytest.approx(0.2)


def test_a_padded_step_takes_what_its_padded_size_takes() -> None:
    times = linear()
    times.sizes = StepSizes([1, 4, 8, 16])
    assert [times.predict(n) for n in (1, 2, 5, 8, 9, 17)] == [linear().predict(n) for n in (1, 4, 8, 8, 16, 17)]
    tokens = np.arange(1, 40)
    assert times.predict_all(tokens) == pytest.approx([times.predict(n) for n in tokens.tolist()])
    for _ in range(100):
        times.observe(8, 0.058)
        times.observe(9, 0.08)
    assert times.predict(9) == times.predict(16) == pytest.approx(0.08, rel=0.03)
    assert times.predict(8) == pytest.approx(0.058, rel=0.03)


def test_a_disturbed_measurement_does_not_make_a_size_dearer_than_a_larger_one() -> None:
    times = linear()
    times.seconds[GRID.index(4)] = 9.0
    assert times.predict(4) == pytest.approx(times.predict(6))


def test_follows_what_steps_take_now() -> None:
    times = linear()
    for _ in range(200):
        times.observe(8, 0.2)
    assert times.predict(8) == pytest.approx(0.2, rel=0.05)
    assert times.predict(1) > 0.1  # a busier machine is slower at every size


def test_a_step_larger_than_all_that_were_timed_teaches_nothing_if_it_takes_what_was_predicted() -> None:
    times = linear()
    for _ in range(50):
        times.observe(1000, 1.05)
    assert times.predict(1000) == pytest.approx(1.05)
    assert times.predict(8) == pytest.approx(linear().predict(8))


def test_one_hiccup_moves_an_estimate_little() -> None:
    times = linear()
    times.observe(16, 60.0)
    assert times.predict(16) < 0.066 * 1.08


@pytest.mark.parametrize(("seconds", "tokens"), [(0.1, 50), (0.0, 1), (9.9, 2048)])
def test_largest_within(seconds: float, tokens: int) -> None:
    found = linear().largest_within(seconds, 1, 2048)
    assert found == tokens


def test_calibrates_up_to_the_largest_size() -> None:
    times = StepTimes()
    assert times.calibrate(lambda n: 0.01 * n, [1, 2, 4, 8, 16, 32, 64], budget_s=99)
    assert times.is_measured
    assert times.predict(48) == pytest.approx(0.48)
    assert times.seconds[GRID.index(128)] is None


def test_a_slow_moment_falls_on_all_sizes_alike() -> None:
    """A machine that is three times as slow for a while at the beginning: of each size a later measurement counts."""
    made = 0

    def run(tokens: int) -> float:
        nonlocal made
        made += 1
        return 0.01 * tokens * (3.0 if made < 20 else 1.0)

    times = StepTimes()
    times.calibrate(run, [1, 2, 4, 8, 16, 32, 64], budget_s=99)
    assert [times.predict(n) for n in (1, 8, 64)] == pytest.approx([0.01, 0.08, 0.64])


def test_a_slow_machine_is_timed_in_fewer_rounds() -> None:
    sizes: list[int] = []

    def run(tokens: int) -> float:
        sizes.append(tokens)
        return 1.0

    assert StepTimes().calibrate(run, [1, 2], budget_s=6.5)  # two to warm up, and two rounds of two come to six
    assert sizes == [1, 1, 2, 2, 1, 2, 1, 2]
    assert not StepTimes().calibrate(run, [1, 2], budget_s=3.0)


def test_measurements_that_disagree_are_not_worth_keeping() -> None:
    taken = iter(range(1, 1000))
    assert not StepTimes().calibrate(lambda n: float(next(taken)), [1, 2, 4], budget_s=9999)


def test_calibration_on_a_crawling_machine_ends_early_and_is_not_kept() -> None:
    times = StepTimes()
    assert not times.calibrate(lambda n: 5.0 + n, [1, 2, 4, 8, 16, 32, 64, 128], budget_s=4)
    assert times.is_measured
    assert [size for size, s in zip(GRID, times.seconds, strict=True) if s is not None] == [1, 2]


def test_survives_a_restart_and_a_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "times.json"
    assert step_times.load(file) is None
    step_times.save(linear(), file)
    assert step_times.load(file) == linear()
    file.write_text("{")
    assert step_times.load(file) is None
    file.write_text("[0.1, 0.2]")  # of other sizes
    assert step_times.load(file) is None


def test_nothing_measured_cannot_predict() -> None:
    assert not StepTimes().is_measured
    with pytest.raises(LookupError):
        StepTimes().predict(1)


def test_steps_with_drafts_tell_their_own_price_and_leave_that_of_plain_steps() -> None:
    times = linear()
    plain_s, dear_s = times.predict(8), 1.2 * times.predict(16)
    for step in range(250):
        times.observe(*((16, dear_s, Kind.COPIED) if step % 25 else (8, plain_s)))
    times.observe(8, plain_s)
    assert times.predict(8) == pytest.approx(plain_s, rel=0.03)
    assert times.predict(16) * times.factors.copied == pytest.approx(dear_s, rel=0.05)


def test_computing_is_priced_beside_what_its_parts_take() -> None:
    times = linear()
    plain_s, drafted_s, draft_s = times.predict(8), times.predict(16), 0.02
    for _ in range(100):
        times.observe(8, 1.5 * plain_s)
        times.observe(16, 1.5 * 1.2 * (drafted_s + draft_s), Kind.COMPUTED, draft_s * times.now)
    factor = float(times.computed(np.array([16]))[0])
    assert 1.03 < factor < 1.2  # the size takes some of the blame
    assert factor * (times.predict(16) + draft_s * times.now) == pytest.approx(1.8 * (drafted_s + draft_s), rel=0.03)


def test_a_machine_that_slows_down_while_all_steps_have_drafts_is_noticed() -> None:
    times = linear()
    plain_s, drafted_s = times.predict(8), times.predict(16)
    for _ in range(24):
        times.observe(16, 1.3 * drafted_s, Kind.COPIED)
    assert 1.05 * plain_s < times.predict(8) < 1.3 * plain_s
    times.observe(8, 1.3 * plain_s)
    assert times.predict(8) == pytest.approx(1.3 * plain_s, rel=0.05)


def test_the_first_plain_steps_say_at_once_how_fast_the_machine_is_now() -> None:
    times = linear()
    usual_s = times.predict(8)
    for _ in range(3):
        times.observe(8, 1.3 * usual_s)
    assert times.predict(8) == pytest.approx(1.3 * usual_s, rel=0.03)


def test_steps_that_disagree_do_not_drive_each_other_away() -> None:
    """Plain steps say that all is slower, those with drafts that they are faster, again and again."""
    times = linear()
    usual = {n: times.predict(n) for n in (1, 8, 64, 512)}
    for _ in range(2000):
        times.observe(8, 1.2 * usual[8])
        times.observe(24, 0.5 * usual[8], Kind.COPIED)
    assert times.predict(8) == pytest.approx(1.2 * usual[8], rel=0.1)
    assert all(0.3 * usual[n] < times.predict(n) < 2.5 * usual[n] for n in usual)


def test_a_size_that_turns_out_dearer_than_larger_ones_takes_them_along_and_does_not_run_away() -> None:
    times = StepTimes([0.01] * len(GRID))
    for _ in range(500):
        times.observe(8, 0.01)
        times.observe(24, 0.02)
    assert times.predict(24) == pytest.approx(0.02, rel=0.1)
    assert times.predict(64) == pytest.approx(0.02, rel=0.1)
    assert times.predict(8) == pytest.approx(0.01, rel=0.1)
    assert times.predict(512) == pytest.approx(0.02, rel=0.1)
