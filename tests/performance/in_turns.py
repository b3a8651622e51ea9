"""What drafters are worth in the batch loop: the same questions with each of them in turns, in one process.

usage: python -m tests.performance.in_turns MODEL_FOLDER --prompts FILE [--drafters auto,suffix,none] [--passes 3]

Without server and sockets, and with both sides on one machine at nearly one time: far less noisy than two servers one
after the other. The first passes (`--warm-up`) compile shapes and count for nothing. Ratios are to the last drafter.
"""

import json
import statistics
import sys
import time
from typing import Any

from tests.performance import loop_profile


def main() -> int:
    parser = loop_profile.parser(__doc__)
    parser.add_argument("--drafters", default="auto,suffix,none", help="by name, separated by commas")
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    ready, prompts = loop_profile.prepared(options)
    drafters = options.drafters.split(",")
    speeds: dict[str, list[float]] = {name: [] for name in drafters}
    number = 0
    for turn in range(options.warm_up + options.passes):
        for name in drafters[:: -1 if turn % 2 else 1]:
            options.drafter, number = name, number + 1
            began = time.perf_counter()
            steps = loop_profile.run(ready, prompts, options, number)
            figures = told(steps, time.perf_counter() - began)
            print(json.dumps({"pass": turn, "drafter": name} | figures), flush=True)
            if turn >= options.warm_up:
                speeds[name].append(figures["tokens_per_s"])
    for name in drafters:
        ratios = [own / base for own, base in zip(speeds[name], speeds[drafters[-1]], strict=True)]
        print(f"{name:8} {statistics.median(ratios):.3f} × {drafters[-1]}, by pass", [round(r, 3) for r in ratios])
    return 0


def told(steps: list[loop_profile.Step], wall_s: float) -> dict[str, Any]:
    """Of one pass over all questions."""
    reports = [step.report for step in steps]
    return {
        "tokens_per_s": round(sum(r.gained for r in reports) / wall_s, 1),
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
