"""Verbs that look at and steer the models of a running server: ps, load, unload, pin, unpin, reload."""

import argparse
import time
from pathlib import Path
from typing import Any

from router.cli.client import connect, quoted
from router.cli.fetching import fetch_unknown
from router.cli.output import ExitStatus, Output
from router.cli.verbs import MODELS, SERVER, Run, Verbs, add_server
from router.units import age, in_binary_units

LOAD_TIMEOUT_S = 3600.0  # a large model from a slow disk; Ctrl-C ends the wait, not the loading
UNLOAD_TIMEOUT_S = 120.0
COLUMNS = ("MODEL", "STATE", "PID", "MEMORY", "RUNNING", "WAITING", "UP", "IDLE", "RESTARTS", "NOTES")


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "ps",
        topic=MODELS,
        help="models with their processes, memory and work",
        examples="mlxspec ps\nmlxspec ps --all --json",
        run=show_processes,
    )
    parser.add_argument("-a", "--all", action="store_true", help="also those that are not loaded")
    add_server(parser)
    parser = verbs.add(
        "load",
        topic=MODELS,
        help="load a model, and wait until it is ready",
        examples="mlxspec load smollm2-135m\nmlxspec load ./my-model --name mine",
        run=load,
    )
    parser.add_argument("model", help="a model's name, a folder or a Hugging Face id")
    parser.add_argument("--name", help="the name under which a new model is served")
    parser.add_argument("--no-wait", action="store_true", help="return at once")
    add_server(parser)
    _add_named(verbs, "unload", "unload a model when its requests are done", unload)
    _add_named(verbs, "pin", "load a model and keep it loaded", pin)
    _add_named(verbs, "unpin", "let a pinned model go again when room is needed", unpin)
    add_server(
        verbs.add("reload", topic=SERVER, help="read the configuration again", examples="mlxspec reload", run=reload)
    )


def show_processes(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).get("/models")
    if output.is_json:
        output.json(answer)
        return ExitStatus.OK
    models = [model for model in answer["models"] if options.all or model["workers"] or model["detail"]]
    output.table(COLUMNS, [row for model in models for row in rows(model, time.time())])
    if not models:
        hint = "mlxspec ps --all names the known ones" if answer["models"] else "mlxspec load FOLDER loads one"
        output.note(f"no model is loaded; {hint}")
    output.note(
        f"memory: {in_binary_units(answer['memory_used_bytes'])} of {in_binary_units(answer['memory_budget_bytes'])}"
    )
    return ExitStatus.OK


def rows(model: dict[str, Any], now: float) -> list[list[str]]:
    """One row for each process of a model; one for a model that has none."""
    notes = ["default"] * model["is_default"] + ["pinned"] * model["pinned"] + [model["detail"]] * bool(model["detail"])
    idle = age(now - model["last_used_at"]) if model["last_used_at"] else "-"
    tail = [str(model["restarts"]), ", ".join(notes)]
    if not model["workers"]:
        return [[model["name"], model["state"], "-", "-", "-", "-", "-", idle, *tail]]
    return [
        [
            model["name"],
            worker["state"],
            str(worker["pid"]),
            in_binary_units(worker["footprint_bytes"]),
            str(worker["running"]),
            str(worker["waiting"]),
            age(now - worker["started_at"]) if worker["started_at"] else "-",
            "-" if worker["running"] else idle,
            *tail,
        ]
        for worker in model["workers"]
    ]


def load(options: argparse.Namespace, output: Output) -> int:
    body: dict[str, Any] = {"wait": not options.no_wait}
    folder = Path(options.model).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        body |= {"path": str(folder.absolute()), "name": options.name or folder.absolute().name}
    elif options.name:
        body |= {"path": options.model, "name": options.name}
    else:
        body |= {"model": options.model}
    client = connect(options)
    if "model" in body and not options.no_wait:
        fetch_unknown(client, options.model, output)
    answer = client.call("POST", "/models/load", body, LOAD_TIMEOUT_S)
    if output.is_json:
        output.json(answer)
    else:
        # Without a wait it may be a download that was begun.
        output.line(f"{answer['name']} is {answer.get('state') or answer['stage']}")
    return ExitStatus.OK


def unload(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("DELETE", f"/models/{quoted(options.model)}", timeout_s=UNLOAD_TIMEOUT_S)
    return _done(output, answer, f"{answer['name']} is unloaded")


def pin(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("POST", "/models/pin", {"model": options.model, "pinned": True})
    return _done(output, answer, f"{answer['name']} is pinned")


def unpin(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("POST", "/models/pin", {"model": options.model, "pinned": False})
    return _done(output, answer, f"{answer['name']} is not pinned any more")


def reload(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("POST", "/reload")
    return _done(output, answer, "\n".join(answer["changes"]))


def _add_named(verbs: Verbs, name: str, what: str, run: Run) -> None:
    parser = verbs.add(name, topic=MODELS, help=what, examples=f"mlxspec {name} smollm2-135m", run=run)
    parser.add_argument("model", help="a model's name")
    add_server(parser)


def _done(output: Output, answer: Any, text: str) -> int:
    if output.is_json:
        output.json(answer)
    else:
        output.line(text)
    return ExitStatus.OK
