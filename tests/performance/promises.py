"""What drafts promise, and what they keep: the steps of the batch loop by how many tokens were drafted in them.

usage: python -m tests.performance.promises MODEL_FOLDER --prompts FILE [--rows 8] [--modes auto,head:3,none]

`auto` and the other drafters leave the choice to the controller; `head:3` drafts three tokens with `head` for every row
in every step, whatever it costs. What is learned in forced steps stays learned: list them last.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.performance import loop_profile
from worker.drafters.controller import Controller, Costs, Decision
from worker.drafting import Drafting, Plan
from worker.report import StepReport

SIZES = (1, 8, 16, 32, 64, 96, 128, 192)


@dataclass(slots=True)
class Promise:
    """Of one step: tokens that it is to gain, and the seconds that it is to take."""

    gained: float
    seconds: float
    drafting_s: float = 0.0  # of them, for the drafters that compute


@dataclass(slots=True)
class Watch:
    """Notes what each step is to bring, by the decision that it goes by, or forces drafts of one length on it."""

    forced: int = 0
    promise: Promise | None = None  # of the latest step; none of one whose drafts are forced

    def install(self) -> None:
        decide, best_plan = Controller.decide, Drafting._best_plan

        def deciding(own: Controller, candidates: Any, reaches: Any, rows: int, costs: Costs) -> Decision:
            decision = decide(own, candidates, reaches, rows, costs)
            lengths = tuple(min(self.forced, candidate.length) for candidate in candidates)
            return replace(decision, lengths=lengths) if self.forced else decision

        def planning(own: Drafting, rows: Any, offers: Any, costs: Costs) -> Plan:
            plan = best_plan(own, rows, offers, costs)
            self.promise = None if self.forced else promised(plan.decision, len(rows), costs)
            return plan

        Controller.decide, Drafting._best_plan = deciding, planning  # type: ignore[method-assign]


def promised(decision: Decision, rows: int, costs: Costs) -> Promise:
    size = np.array([rows + sum(decision.lengths)])
    factor = float(np.max(costs.computed(size))) if decision.draft_s else costs.copied if any(decision.lengths) else 1.0
    seconds = factor * (float(np.max(costs.steps_s(size))) + decision.draft_s)
    return Promise(decision.goodput * seconds, seconds, decision.draft_s)


def main() -> int:
    parser = loop_profile.parser(__doc__)
    parser.add_argument("--modes", default="auto,none")
    parser.add_argument("--passes", type=int, default=2)
    options = parser.parse_args()
    ready, prompts = loop_profile.prepared(options)
    watch = Watch()
    watch.install()
    number = 0
    for mode in options.modes.split(","):
        options.drafter, _, forced = mode.partition(":")
        watch.forced = int(forced or 0)
        for turn in range(options.passes):
            number += 1
            began = time.perf_counter()
            steps = noted(watch, ready, prompts, options, number)
            wall_s = time.perf_counter() - began
            print(f"{mode}, pass {turn}: {sum(r.gained for r, _ in steps) / wall_s:.1f} tokens/s", flush=True)
        tell(steps)
        tell_prices(ready)
    return 0


def noted(watch: Watch, ready: Any, prompts: Any, options: Any, number: int) -> list[tuple[StepReport, Promise | None]]:
    """The steps of a pass with what was promised of each."""
    engine, notes = ready.engine, []
    step = engine.step

    class Noting:
        """The engine, with an eye on its steps."""

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def step(self) -> StepReport:
            watch.promise = None
            report: StepReport = step()
            notes.append((report, watch.promise))
            return report

    loop_profile.run(replace(ready, engine=Noting()), prompts, options, number)
    return notes


def tell(steps: list[tuple[StepReport, Promise | None]]) -> None:
    """A line for the steps with prompts, the plain ones, and those with ever more drafts."""
    groups: dict[str, list[tuple[StepReport, Promise | None]]] = defaultdict(list)
    for report, promise in steps:
        per_row = report.drafted / max(report.decoding, 1)
        name = "with prompts" if report.prefill_tokens else f"{np.ceil(2 * per_row) / 2:.1f} drafted a row"
        groups[name].append((report, promise))
    for name, group in sorted(groups.items()):
        reports = [report for report, _ in group]
        kept = [(report, promise) for report, promise in group if promise is not None and report.drafted]
        line = (
            f"  {name:18} {len(group):4} steps, rows {mean(r.decoding for r in reports):5.1f}, drafted "
            f"{mean(r.drafted for r in reports):6.1f}, gained {mean(r.gained for r in reports):6.1f}, ms: "
            f"{usual_ms(r.total_s for r in reports):6.2f}, before {usual_ms(r.draft_s for r in reports):5.2f}"
        )
        if kept:
            line += (
                f"; promised {mean(p.gained for _, p in kept):6.1f} in {usual_ms(p.seconds for _, p in kept):6.2f}"
                f" (drafting {usual_ms(p.drafting_s for _, p in kept):5.2f}), "
                f"kept {mean(r.gained for r, _ in kept):6.1f} in {usual_ms(r.total_s for r, _ in kept):6.2f}"
            )
        print(line, flush=True)


def tell_prices(ready: Any) -> None:
    """What steps and positions of drafts are thought to take now, and what those with computed drafts take besides."""
    engine = ready.engine
    sizes = np.array(SIZES)
    rows = {"step": engine.times.predict_all(sizes)}
    for name, drafter in engine.drafting.drafters.items():
        if drafter.computes:
            rows[name] = drafter.step_s(sizes) * engine.times.now
    rows["computed"] = (engine.times.computed(sizes) - 1.0) * rows["step"]
    for name, prices in rows.items():
        print(f"  {name:10}", " ".join(f"{n}: {1e3 * s:.2f}" for n, s in zip(SIZES, prices, strict=True)), flush=True)
    controller = engine.drafting.controller
    for name, match in sorted(controller.priors):
        print(f"  {name} {match} stands", [round(chance, 2) for chance in controller.usual(name, match)], flush=True)


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def usual_ms(seconds: Iterable[float]) -> float:
    """The median, in milliseconds: a step that was disturbed says nothing."""
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
