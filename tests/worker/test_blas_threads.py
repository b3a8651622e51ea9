"""The choice of BLAS threads."""

from worker.blas_threads import CALM_STEPS, FIRST_PAUSE_STEPS, ThreadChoice


def test_stays_with_all_threads_on_a_calm_machine_and_through_a_hiccup() -> None:
    choice = ThreadChoice(most=2)
    times = ([0.12] * 50 + [0.5]) * 20
    assert {choice.observe(seconds, 0.1) for seconds in times} == {2}


def test_a_crawling_step_pauses_and_each_further_one_pauses_longer() -> None:
    choice = ThreadChoice(most=2)
    assert choice.observe(2.0, 0.1) == 1
    assert [choice.observe(0.14, 0.1) for _ in range(FIRST_PAUSE_STEPS)].count(1) == FIRST_PAUSE_STEPS - 1
    assert choice.observe(2.0, 0.1) == 1
    assert [choice.observe(0.14, 0.1) for _ in range(2 * FIRST_PAUSE_STEPS)].count(1) == 2 * FIRST_PAUSE_STEPS - 1


def test_steadily_slow_steps_pause_too() -> None:
    choice = ThreadChoice(most=2)
    assert 1 in [choice.observe(0.4, 0.1) for _ in range(20)]


def test_a_calm_time_makes_the_next_pause_short_again() -> None:
    choice = ThreadChoice(most=2)
    choice.observe(2.0, 0.1)
    for _ in range(FIRST_PAUSE_STEPS + CALM_STEPS + 1):
        choice.observe(0.1, 0.1)
    assert choice.pause_steps == FIRST_PAUSE_STEPS
