"""Verbs for the models on this machine; none of them needs a running server."""

import argparse

from common.forms import FORMS, GROUP_SIZES
from router.cli.client import connect, quoted
from router.cli.hub import tell_server
from router.cli.output import ExitStatus, NoServer, Output
from router.cli.progress import showing
from router.cli.verbs import MODELS, Verbs, add_json, add_server
from router.hub.ids import check_form, check_id
from router.hub.store import PendingModel, Store, read_origin
from router.hub.wishes import Wish
from router.units import in_units


def add_verbs(verbs: Verbs) -> None:
    listing = verbs.add(
        "list", topic=MODELS, help="list the models on this machine", examples="mlxspec list", run=run_list
    )
    add_json(listing)
    remove = verbs.add(
        "rm",
        topic=MODELS,
        help="delete a model from this machine",
        examples="mlxspec rm mlx-community/Qwen3-0.6B-4bit",
        run=run_rm,
    )
    remove.add_argument("names", metavar="NAME", nargs="+", help="as `mlxspec list` shows it")
    add_server(remove)
    verify = verbs.add(
        "verify",
        topic=MODELS,
        help="compare a downloaded model with the hub's sizes and hashes",
        examples="mlxspec verify Qwen/Qwen3-0.6B",
        run=run_verify,
    )
    verify.add_argument("name", metavar="NAME", help="as `mlxspec list` shows it")
    add_json(verify)
    convert = verbs.add(
        "convert",
        topic=MODELS,
        help="bring a local checkpoint into MLX form, quantized on request",
        examples="mlxspec convert ./checkpoint --quantize q4\nmlxspec convert gpt2 --quantize mxfp4 --name my-gpt2",
        run=run_convert,
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with safetensors of any model that mlx-lm supports, or a name in the store",
    )
    convert.add_argument("--quantize", metavar="FORM", choices=FORMS, help=", ".join(FORMS))
    convert.add_argument(
        "--group-size", metavar="N", type=int, choices=GROUP_SIZES, help="weights that share a scale (default: 64)"
    )
    convert.add_argument("--name", metavar="NAME", help="its name in the store (default: SOURCE's with the form)")
    add_json(convert)


def run_list(options: argparse.Namespace, output: Output) -> int:
    store = Store()
    models, stats = store.models(), store.stats()
    if output.is_json:
        output.json({"models": models, "stats": stats})
        return ExitStatus.OK
    output.table(
        ("model", "size", "architecture", "form", "from"),
        [(m.name, in_units(m.size_bytes), m.architecture, m.quantization, m.origin or "") for m in models],
    )
    if output.is_terminal:
        room = f"{in_units(stats.models_bytes)} in {stats.path}, {in_units(stats.free_bytes)} free"
        output.note(f"\n{room}" if models else f"no models yet ({room}); try mlxspec popular")
        for pending in stats.pending:
            output.note(f"{pending.name}: {in_units(pending.size_bytes)}, {_state(pending)}")
    return ExitStatus.OK


def _state(pending: PendingModel) -> str:
    if pending.is_active:
        return "under way"
    if pending.wish is None:
        return f"cut off in a conversion; to remove it: mlxspec rm {pending.name}"
    return f"stopped; to go on: {pending.wish.command}"


def run_rm(options: argparse.Namespace, output: Output) -> int:
    for name in options.names:
        check_id(name)
    freed = {name: _remove(name, options) for name in options.names}
    if output.is_json:
        output.json({"deleted": [{"id": name, "freed_bytes": size} for name, size in freed.items()]})
    else:
        for name, size in freed.items():
            output.line(f"{name} is deleted, {in_units(size)} are free")
    return ExitStatus.OK


def _remove(name: str, options: argparse.Namespace) -> int:
    """By the server if one runs, which knows what is loaded; else from the disk."""
    try:
        return int(connect(options).call("DELETE", f"/hf/models/{quoted(name)}")["freed_bytes"])
    except NoServer:
        return Store().delete(name)


def run_verify(options: argparse.Namespace, output: Output) -> int:
    problems = Store().verify(options.name)
    if output.is_json:
        output.json({"id": options.name, "ok": not problems, "problems": problems})
    else:
        for problem in problems:
            output.line(f"{problem.file} {problem.problem}")
        if not problems:
            output.line(f"{options.name} is whole")
        elif origin := read_origin(Store().find(options.name)):
            output.note(f"to fetch it anew: {Wish(id=origin.id, quantize=origin.form).command} --force")
    return ExitStatus.FAILED if problems else ExitStatus.OK


def run_convert(options: argparse.Namespace, output: Output) -> int:
    from router.hub.convert_local import convert_local

    check_form(options.quantize, options.group_size)
    store = Store()
    with showing(output, options.source) as tell:
        path = convert_local(options.source, options.name, options.quantize, options.group_size, store, tell)
    tell_server(output)
    model = store.describe(path)
    if output.is_json:
        output.json(model)
    else:
        output.line(f"{model.name} is in {path}: {model.quantization}, {in_units(model.size_bytes)}")
    return ExitStatus.OK
