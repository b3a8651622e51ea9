"""What drafters are worth in the batch loop: the same questions with each of them in turns, in one process.

usage: python -m tests.performance.in_turns MODEL_FOLDER --prompts FILE [--drafters auto,suffix,none] [--passes 3]

Without server and sockets, and with all sides on one machine at nearly one time: far less noisy than two servers one
after the other. A pass answers all questions with each drafter; with `--by-step` each has a model of its own in memory,
and they take turns step by step, so that a machine which others use as well is the same for all of them. The first
passes (`--warm-up`) compile shapes and count for nothing. Ratios are to the last drafter.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.performance import loop_profile
from worker.assemble import Ready


def main() -> int:
    parser = loop_profile.parser(__doc__)
    parser.add_argument("--drafters", default="auto,suffix,none", help="by name, separated by commas")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--by-step", action="store_true", help="in turns step by step, not pass by pass")
    options = parser.parse_args()
    ready, prompts = loop_profile.prepared(options)
    drafters = options.drafters.split(",")
    readies = [ready, *(loop_profile.loaded(options) for _ in drafters[1:])] if options.by_step else []
    speeds: dict[str, list[float]] = {name: [] for name in drafters}
    for turn in range(options.warm_up + options.passes):
        if options.by_step:
            runs = [Run(one, prompts, options, name, turn) for one, name in zip(readies, drafters, strict=True)]
            by_step(runs)
        else:
            order = drafters[:: -1 if turn % 2 else 1]
            runs = [Run(ready, prompts, options, name, turn * len(drafters) + i) for i, name in enumerate(order)]
            for run in runs:
                by_step([run])
        for run in runs:
            figures = told(run.steps, run.taken_s)
            print(json.dumps({"pass": turn, "drafter": run.drafter} | figures), flush=True)
            if turn >= options.warm_up:
                speeds[run.drafter].append(figures["tokens_per_s"])
    for name in drafters:
        ratios = [own / base for own, base in zip(speeds[name], speeds[drafters[-1]], strict=True)]
        print(f"{name:8} {ratio_of(ratios)} × {drafters[-1]}, by pass", [round(r, 3) for r in ratios])
    return 0


class Run:
    """All questions answered with one drafter: its steps so far, and the seconds that they took."""

    def __init__(
        self, ready: Ready, prompts: list[tuple[int, ...]], options: argparse.Namespace, drafter: str, number: int
    ) -> None:
        self.drafter, self.taken_s = drafter, 0.0
        self.steps: list[loop_profile.Step] = []
        own = argparse.Namespace(**vars(options) | {"drafter": drafter})
        self._left = loop_profile.stepping(ready, prompts, own, number)

    def step(self) -> bool:
        """One step, if there is one left."""
        began = time.perf_counter()
        step = next(self._left, None)
        self.taken_s += time.perf_counter() - began
        if step is not None:
            self.steps.append(step)
        return step is not None


def by_step(runs: Sequence[Run]) -> None:
    """Run all to their ends, a step of each in turn, now this one first and now that."""
    left = list(runs)
    while left:
        left = [run for run in left if run.step()][::-1]


def ratio_of(ratios: list[float]) -> str:
    """The median of all passes, and their mean with its standard error."""
    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return f"{statistics.median(ratios):.3f} (mean {math.exp(statistics.fmean(logs)):.3f} ± {error:.3f})"


def told(steps: list[loop_profile.Step], wall_s: float) -> dict[str, Any]:
    """Of one pass over all questions."""
    reports = [step.report for step in steps]
    return {
        "tokens_per_s": round(sum(r.gained for r in reports) / wall_s, 2),
        "shapes_compiled": sum(step.shapes for step in steps),
        "compiling_s": round(sum(step.report.total_s for step in steps if step.shapes), 2),
        "steps": len(reports),
        "with_prompts_s": round(sum(r.total_s for r in reports if r.prefill_tokens), 2),
        "decoding_s": round(sum(r.total_s for r in reports if not r.prefill_tokens), 2),
        "drafted": sum(r.drafted for r in reports),
        "accepted": sum(r.accepted for r in reports),
    }


if __name__ == "__main__":
    sys.exit(main())
