"""What steps with computed drafts take beyond their parts is learned where it is seen, and a little everywhere."""

import pytest

from worker.drafters.surcharge import Surcharge


def test_a_size_that_is_dear_is_known_to_be_and_the_others_are_suspected() -> None:
    surcharge = Surcharge()
    for _ in range(10):
        surcharge.learn(16, 1.3, 1.0)
    assert 0.15 < surcharge.at(16) < 0.3
    assert 0.0 < surcharge.at(64) < 0.3 * surcharge.at(16)


def test_sizes_that_are_taken_in_turns_are_told_apart() -> None:
    surcharge = Surcharge()
    for _ in range(200):
        surcharge.learn(16, 1.3, 1.0)
        surcharge.learn(2, 1.0, 1.0)
    assert surcharge.at(16) == pytest.approx(0.3, abs=0.06)
    assert surcharge.at(2) == pytest.approx(0.0, abs=0.06)


def test_between_two_sizes_both_learn() -> None:
    surcharge = Surcharge()
    for _ in range(300):
        surcharge.learn(20, 1.2, 1.0)
    assert surcharge.at(20) == pytest.approx(0.2, abs=0.01)
    assert surcharge.at(2000) >= 0.0


def test_one_hiccup_and_steps_that_were_faster_say_little() -> None:
    surcharge = Surcharge()
    surcharge.learn(8, 100.0, 1.0)
    assert surcharge.at(8) < 0.03
    for _ in range(100):
        surcharge.learn(8, 0.5, 1.0)
    assert surcharge.at(8) == 0.0
    for _ in range(8):
        surcharge.learn(8, 1.3, 1.0)
    assert surcharge.at(8) > 0.1


def test_it_fades() -> None:
    surcharge = Surcharge()
    surcharge.learn(8, 2.0, 1.0)
    before = float(surcharge.at(8))
    surcharge.fade(0.5)
    assert surcharge.at(8) == pytest.approx(before / 2)
