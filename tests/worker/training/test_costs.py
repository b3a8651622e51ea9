"""What a report says that drafts and steps cost."""

import numpy as np
import pytest

from tests.worker.training import language
from worker.training import costs
from worker.training.plan import Plan, fresh_head, head_config


def test_a_drafts_price_is_that_of_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of several positions is timed, for nobody waits between them."""
    model = language.untrained()
    head = fresh_head(model, head_config(model, language.CONFIG, Plan()), np.arange(40, dtype=np.int32), seed=0)
    monkeypatch.setattr(costs, "time_head", lambda drafter, rows: 0.25 * rows)
    one, two = costs.measure(model, head, (1, 2), 3)
    assert (one.draft_s, two.draft_s) == (0.25, 0.5)
    assert len(one.step_s) == 4 and all(0 < seconds < 1 for seconds in one.step_s)


def test_the_best_length_is_where_another_token_costs_more_than_it_brings() -> None:
    priced = costs.Costs(rows=1, step_s=(1.0, 1.0, 1.0, 2.0), draft_s=0.1)
    assert priced.speedup([0.5, 0.5, 0.5]) == (pytest.approx(1.75 / 1.2), 2)
    assert priced.speedup([0.0, 0.0, 0.0]) == (1.0, 0)
