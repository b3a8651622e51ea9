"""Measures mlxspec beside mlx_lm.server: same model, weights, prompts and BLAS, in turns, never at the same time.

With --no-speculation the other server is mlxspec again, asked to decode plainly: what speculation alone is worth.
Each measurement has a freshly started server: mlx_lm.server keeps prompts that it has seen, and would be spared
reading them when they come again with another number of clients.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common import openblas, paths
from tests.e2e.server import TOP, Serve, free_port, wait_until
from tests.performance import prompts as texts
from tests.performance.load import Measured, Server, chat, measure

OURS, THEIRS, PLAIN = "mlxspec", "mlx_lm", "plain"
DEMO_MODEL = "smollm2-135m"
STOP_TIMEOUT_S = 10.0
CALM_CORES = 0.1  # what other processes may take of the machine before a figure is called disturbed


@dataclass(frozen=True, slots=True)
class Round:
    """Both servers under the same load, one after the other; `stats` is what ours says about it.

    `rival` names the other server, whose figures are `theirs`.

    `ours_others` and `theirs_others`: cores that other processes kept busy meanwhile.
    """

    clients: int
    rival: str
    ours: Measured
    theirs: Measured
    stats: dict[str, Any]
    ours_others: float
    theirs_others: float

    @property
    def same_texts(self) -> int:
        return sum(a.text == b.text for a, b in zip(self.ours.answers, self.theirs.answers, strict=True))


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server is stopped then, too
    try:
        prompts = choose(options)
        chosen = texts.spread(prompts, options.n)
        others = others_than(chosen, prompts, options.warm_up)
        bodies, warm_up = ([request(prompt, i, options) for i, prompt in enumerate(part)] for part in (chosen, others))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    try:
        facts = our_facts(options.model)
        pair = both(options, facts["weights_dtype"], warm_up)
        print(f"{cores()} cores; {facts['backend']}; {facts['weights_dtype']} weights; model {options.model.name}")
        print(
            f"{len(bodies)} prompts, at most {options.max_tokens} tokens each, temperature {options.temperature:g}",
            flush=True,
        )
        rounds = [
            measure_both(pair, bodies, clients, ours_first=repeat % 2 == 0)
            for clients in options.clients
            for repeat in range(options.repeats)
        ]
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130
    report(rounds)
    if options.json:
        options.json.write_text(json.dumps(raw(options, facts, rounds), indent=1) + "\n")
    return 1 if any(one.ours.errors or one.theirs.errors for one in rounds) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--clients", type=counts, default=[1, 4, 8], metavar="N,...", help="default 1,4,8")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each server; the median counts")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of an answer (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0; each prompt has a seed")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "turns", as Spec-Bench has them')
    parser.add_argument("--edits", action="store_true", help="edit tasks made from this repository's own files")
    parser.add_argument("--categories", type=names, default=[], metavar="NAME,...", help="only these questions of FILE")
    parser.add_argument("--max-chars", type=int, default=900, metavar="N", help="longest prompt of FILE (default 900)")
    parser.add_argument("--n", type=int, default=16, metavar="N", help="how many prompts, evenly spread (default 16)")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=0,
        metavar="N",
        help="other prompts that are asked first and not measured: a GPU makes its kernels when they are first used",
    )
    parser.add_argument("--model", type=Path, default=paths.models_dir() / DEMO_MODEL, metavar="DIR")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="workers that mlxspec is to have (default 1)"
    )
    parser.add_argument("--drafter", metavar="NAME", help="the one that mlxspec is to use (default: its own choice)")
    parser.add_argument(
        "--no-speculation", action="store_true", help="compare with mlxspec without speculation, not with mlx_lm.server"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures of every request")
    return parser.parse_args()


def counts(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least one client is needed")
    return numbers


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def request(prompt: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    return chat(prompt, options.max_tokens, temperature=options.temperature, seed=seed)


def choose(options: argparse.Namespace) -> list[str]:
    """The prompts asked for. Raises `ValueError` when options contradict each other or leave no prompt."""
    if options.edits and options.prompts:
        raise ValueError("--edits and --prompts name different prompts: give one of them")
    if options.categories and not options.prompts:
        raise ValueError("--categories chooses among the questions of --prompts FILE: give that, too")
    if options.edits:
        return texts.edits()
    if not options.prompts:
        return texts.PROMPTS
    chosen = texts.read(options.prompts, options.max_chars, options.categories)
    if not chosen:
        raise ValueError(
            f"{options.prompts} has no such prompt of at most {options.max_chars} characters: raise --max-chars"
        )
    return chosen


def others_than(chosen: list[str], prompts: list[str], count: int) -> list[str]:
    """So many prompts that were not chosen; of our own where there are too few others."""
    rest = [prompt for prompt in prompts if prompt not in chosen]
    if len(rest) < count:
        rest += [prompt for prompt in (*texts.PROMPTS, *texts.edits()) if prompt not in (*chosen, *rest)]
    return texts.spread(rest, count)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the servers --------------------------------------------------------------------------------------


@contextmanager
def our_server(model: Path, replicas: int = 1) -> Iterator[Serve]:
    config = "" if replicas == 1 else f'[models."{model.name}"]\npath = "{model}"\nreplicas = {replicas}\n'
    serve = Serve(model, config)
    try:
        serve.wait_ready()
        wait_until(lambda: ready_workers(serve) == replicas, f"start of {replicas} workers")
        yield serve
        serve.end(signal.SIGTERM)
    finally:
        serve.close()


def ready_workers(serve: Serve) -> int:
    workers = serve.request("GET", f"/models/{serve.model}")[1]["workers"]
    return sum(worker["state"] == "ready" for worker in workers)


def our_facts(model: Path) -> dict[str, Any]:
    """What our worker says about the model once it is loaded; also leaves its measured step times behind."""
    with our_server(model) as serve:
        facts: dict[str, Any] = serve.request("GET", f"/models/{serve.model}")[1]["facts"]
        return facts


def their_folder(model: Path, weights: str) -> Path:
    """The model as mlx_lm.server has to get it to compute with the same weights as we do."""
    if weights != "float32":
        return model
    folder = paths.home() / "bench" / f"{model.name}-float32"
    if not folder.exists():
        print(f"writing {folder}, once", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "tests.performance.dense_model", str(model), str(folder)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(TOP)}, check=True)
    return folder


@contextmanager
def their_server(folder: Path, clients: int) -> Iterator[tuple[Server, int]]:
    """The server, which may decode for all clients at once, and its process id."""
    port = free_port()
    server = Server(THEIRS, f"http://127.0.0.1:{port}", "default_model")
    options = ["--model", str(folder), "--port", str(port), "--decode-concurrency", str(max(clients, 32))]
    command = [sys.executable, "-P", "-m", "mlx_lm", "server", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=their_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(lambda: is_up(server, process), "start of mlx_lm.server")
            yield server, process.pid
        finally:
            stop(process)


def their_environment() -> dict[str, str]:
    """OpenBLAS as our worker gets it; and no fusing of operations where MLX's CPU backend has no compiler for it."""
    environment = openblas.with_preload()
    if openblas.library() and shutil.which("g++") is None:
        environment["MLX_DISABLE_COMPILE"] = "1"
    return environment


def is_up(server: Server, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, f"mlx_lm.server ended with {process.returncode}"
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """How to put either server under a load, and the other's name: each gives figures, others' cores and stats."""

    rival: str
    ours: "Load"
    theirs: "Load"


Load = Callable[[Sequence[dict[str, Any]], int], tuple[Measured, float, dict[str, Any]]]


def both(options: argparse.Namespace, weights: str, warm_up: Sequence[dict[str, Any]]) -> Pair:
    """Our server as asked for, and mlx_lm.server or ours without speculation."""
    model: Path = options.model
    speculative: Any = {"drafter": options.drafter} if options.drafter else True

    def ours(bodies: Sequence[dict[str, Any]], clients: int) -> tuple[Measured, float, dict[str, Any]]:
        loads = [[{**body, "speculative": speculative} for body in part] for part in (bodies, warm_up)]
        return measure_ours(OURS, model, *loads, clients, options.replicas)

    def plain(bodies: Sequence[dict[str, Any]], clients: int) -> tuple[Measured, float, dict[str, Any]]:
        loads = [[{**body, "speculative": False} for body in part] for part in (bodies, warm_up)]
        return measure_ours(PLAIN, model, *loads, clients, options.replicas)

    if options.no_speculation:
        return Pair(PLAIN, ours, plain)
    folder = their_folder(model, weights)

    def theirs(bodies: Sequence[dict[str, Any]], clients: int) -> tuple[Measured, float, dict[str, Any]]:
        """Without seeds: requests that have one are not batched there."""
        loads = [[{k: v for k, v in body.items() if k != "seed"} for body in part] for part in (bodies, warm_up)]
        return measure_theirs(folder, *loads, clients)

    return Pair(THEIRS, ours, theirs)


def measure_both(pair: Pair, bodies: Sequence[dict[str, Any]], clients: int, *, ours_first: bool) -> Round:
    """One round. Who goes first changes with each, so that a drift of the machine's speed cancels out."""
    if ours_first:
        ours, ours_others, stats = pair.ours(bodies, clients)
        theirs, theirs_others, _ = pair.theirs(bodies, clients)
    else:
        theirs, theirs_others, _ = pair.theirs(bodies, clients)
        ours, ours_others, stats = pair.ours(bodies, clients)
    return Round(clients, pair.rival, ours, theirs, stats, ours_others, theirs_others)


def measure_ours(
    name: str,
    model: Path,
    bodies: Sequence[dict[str, Any]],
    warm_up: Sequence[dict[str, Any]],
    clients: int,
    replicas: int,
) -> tuple[Measured, float, dict[str, Any]]:
    with our_server(model, replicas) as serve:
        server = Server(name, serve.url, serve.model)
        measured, others = asyncio.run(warm_measure(server, serve.process.pid, bodies, warm_up, clients))
        return measured, others, serve.request("GET", "/stats")[1]["models"][serve.model]


def measure_theirs(
    folder: Path, bodies: Sequence[dict[str, Any]], warm_up: Sequence[dict[str, Any]], clients: int
) -> tuple[Measured, float, dict[str, Any]]:
    with their_server(folder, clients) as (server, pid):
        return *asyncio.run(warm_measure(server, pid, bodies, warm_up, clients)), {}


async def warm_measure(
    server: Server, pid: int, bodies: Sequence[dict[str, Any]], warm_up: Sequence[dict[str, Any]], clients: int
) -> tuple[Measured, float]:
    """The load, and how many cores other processes kept busy during it."""
    await measure(server, [chat("Say hi.", 8)], 1)
    if warm_up:
        await measure(server, warm_up, clients)
    before_s = others_s(pid)
    measured = await measure(server, bodies, clients)
    others = max(others_s(pid) - before_s, 0.0) / measured.wall_s
    text = f"  {clients} clients, {server.name}: {measured.tokens_per_s:.1f} tokens/s, others took {others:.2f} cores"
    print(text, file=sys.stderr, flush=True)
    return measured, others


def others_s(pid: int) -> float:
    """CPU seconds so far of all processes but this one and the server of `pid` with its children."""
    server = psutil.Process(pid)
    own = [process.cpu_times() for process in (psutil.Process(), server, *server.children(recursive=True))]
    machine = psutil.cpu_times()
    busy_s = float(machine.user + machine.system + getattr(machine, "nice", 0.0))
    return busy_s - float(sum(times.user + times.system for times in own))


# --- the report ---------------------------------------------------------------------------------------


def columns(rival: str) -> list[str]:
    speed = [f"{OURS} tok/s", f"{rival} tok/s", "ratio"]
    waits = ["TTFT p50 s", rival, "ratio", "TTFT max s", rival, "ratio"]
    return ["clients", *speed, *waits, "same texts", "accepted/drafted", "speedup"]


def report(rounds: Sequence[Round]) -> None:
    """A table with one line for each number of clients, and what went wrong. `speedup` is what our /stats says."""
    rival = rounds[0].rival
    by_clients = {one.clients: [r for r in rounds if r.clients == one.clients] for one in rounds}
    rows = [columns(rival), *(row(clients, group) for clients, group in by_clients.items())]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    print()
    for number, cells in enumerate(rows):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print()
    for one in rounds:
        for name, others in ((OURS, one.ours_others), (rival, one.theirs_others)):
            if others > CALM_CORES:
                print(f"DISTURBED: other processes took {others:.2f} cores from {name} at {one.clients} clients")
    for name, all_errors in ((OURS, [r.ours.errors for r in rounds]), (rival, [r.theirs.errors for r in rounds])):
        for error in [text for errors in all_errors for text in errors][:3]:
            print(f"{name} failed: {error}")


def row(clients: int, group: Sequence[Round]) -> list[str]:
    """Medians over the repeats; the longest TTFT is the longest of all."""
    same, total = sum(r.same_texts for r in group), sum(len(r.ours.answers) for r in group)
    return [
        str(clients),
        *compared([r.ours.tokens_per_s for r in group], [r.theirs.tokens_per_s for r in group], statistics.median, 1),
        *compared([r.ours.ttft_p50_s for r in group], [r.theirs.ttft_p50_s for r in group], statistics.median, 2),
        *compared([r.ours.ttft_max_s for r in group], [r.theirs.ttft_max_s for r in group], max, 2),
        f"{same}/{total}",
        f"{sum(r.stats['accepted_tokens'] for r in group)}/{sum(r.stats['draft_tokens'] for r in group)}",
        f"{statistics.median(r.stats.get('speedup', 1.0) for r in group):.2f}",
    ]


def compared(ours: list[float], theirs: list[float], of: Any, digits: int) -> list[str]:
    """Our figure, theirs, and the median of the rounds' ratios."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return [f"{of(ours):.{digits}f}", f"{of(theirs):.{digits}f}", f"{ratio:.2f}"]


def raw(options: argparse.Namespace, facts: dict[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "cores": cores(),
        "facts": facts,
        "rounds": [dataclasses.asdict(one) | {"same_texts": one.same_texts} for one in rounds],
    }


if __name__ == "__main__":
    sys.exit(main())
