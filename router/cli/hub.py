"""Verbs for models on Hugging Face; none of them needs a running server."""

import argparse
from typing import TYPE_CHECKING

from common.errors import MlxspecError
from common.forms import FORMS, GROUP_SIZES
from router.cli.client import connect
from router.cli.output import ExitStatus, NoServer, Output
from router.cli.progress import showing
from router.cli.verbs import HUB, Verbs, add_choice, add_json, number
from router.hub.ids import check_id
from router.hub.store import Store
from router.hub.wishes import Wish
from router.units import in_binary_units, in_units, in_words

if TYPE_CHECKING:
    from router.hub.catalog import Found
    from router.hub.fit import Fit


def add_verbs(verbs: Verbs) -> None:
    search = verbs.add(
        "search",
        topic=HUB,
        help="find models on Hugging Face, those for MLX first",
        examples="mlxspec search phi-3\nmlxspec search qwen3 --library mlx --max-size-gb 4 --sort likes",
        run=run_search,
    )
    search.add_argument("words", metavar="WORDS", nargs="*", help="parts of the model's name")
    add_choice(search, "--library", "mlx-first", ("mlx-first", "mlx", "any"), "whose models")
    add_choice(search, "--task", "text-generation", ("text-generation", "any"), "what they are made for")
    sorts = ("downloads", "likes", "trending_score", "last_modified", "created_at")
    add_choice(search, "--sort", "downloads", sorts, "the most of it first")
    search.add_argument("--license", metavar="NAME", help="such as mit or apache-2.0")
    search.add_argument("--max-size-gb", metavar="N", type=number, help="leave out models whose weights are larger")
    search.add_argument("--limit", metavar="N", type=int, default=20, help="most models to show (default: 20)")
    add_json(search)
    popular = verbs.add(
        "popular",
        topic=HUB,
        help="list the models that a drafter is here for, and the most downloaded MLX text models",
        examples="mlxspec popular",
        run=run_popular,
    )
    popular.add_argument("--limit", metavar="N", type=int, default=20, help="most models to show (default: 20)")
    add_json(popular)
    info = verbs.add(
        "info",
        topic=HUB,
        help="tell all about one model: size, memory, whether it runs here, who drafts for it",
        examples="mlxspec info mlx-community/Qwen3-0.6B-4bit",
        run=run_info,
    )
    info.add_argument("id", metavar="ID", help="a model of Hugging Face (OWNER/NAME), or one in the store")
    info.add_argument("--revision", metavar="REV", help="a branch, tag or commit of the hub")
    add_json(info)
    _add_download(verbs)


def _add_download(verbs: Verbs) -> None:
    download = verbs.add(
        "download",
        topic=HUB,
        help="download a model; the same command goes on after a stop",
        description="Download a model of Hugging Face into MLXSPEC_HOME/models. Only what a text model needs is "
        "fetched, checked by size and hash, and put in place at once. The same command goes on after a stop.",
        examples="mlxspec download mlx-community/Qwen3-0.6B-4bit\nmlxspec download Qwen/Qwen3-0.6B --quantize q4",
        run=run_download,
    )
    download.add_argument("id", metavar="ID", help="OWNER/NAME")
    download.add_argument("--revision", metavar="REV", help="a branch, tag or commit (default: main)")
    download.add_argument(
        "--quantize", metavar="FORM", choices=FORMS, help=f"bring it into this form, as ID-FORM: {', '.join(FORMS)}"
    )
    download.add_argument(
        "--group-size", metavar="N", type=int, choices=GROUP_SIZES, help="weights that share a scale (default: 64)"
    )
    download.add_argument("--force", action="store_true", help="download anew even if it is there")
    add_json(download)


def run_search(options: argparse.Namespace, output: Output) -> int:
    from router.hub.catalog import search
    from router.hub.query import Query

    query = Query(
        query=" ".join(options.words),
        task=options.task,
        library=options.library,
        sort=options.sort,
        license=options.license,
        max_size_gb=options.max_size_gb,
        limit=options.limit,
    )
    return _show_found(search(query, Store()), output)


def run_popular(options: argparse.Namespace, output: Output) -> int:
    from router.hub.catalog import popular

    return _show_found(popular(Store(), options.limit), output)


def _show_found(found: "list[Found]", output: Output) -> int:
    if output.is_json:
        output.json({"models": found})
        return ExitStatus.OK
    output.table(
        ("model", "size", "form", "downloads", "licence", "here"),
        [
            (
                model.id,
                in_units(model.size_bytes) if model.size_bytes else "?",
                model.quantization,
                f"{model.downloads}",
                model.license or "?",
                ("yes" if model.is_local else "")
                + (" drafter" if model.drafts else "")
                + (" gated" if model.gated else ""),
            )
            for model in found
        ],
    )
    if not found:
        output.note("nothing found; try fewer words or --library any")
    elif output.is_terminal:
        output.note("\nmlxspec info ID says whether it runs here; mlxspec download ID fetches it")
    return ExitStatus.OK


def run_info(options: argparse.Namespace, output: Output) -> int:
    from common import config as configuration
    from router.hub.catalog import info

    limit_gb = configuration.load().supervisor.memory_limit_gb
    details = info(check_id(options.id), Store(), options.revision, limit_gb)
    if output.is_json:
        output.json(details)
        return ExitStatus.OK
    fit, drafters = details.fit, details.drafters
    trained = ", ".join(drafters.trained) or "none here"
    output.facts(
        [
            ("model", f"{details.id} ({details.source})"),
            ("revision", details.revision or "?"),
            ("architecture", details.architecture),
            ("weights", f"{details.quantization}, {in_units(details.size_bytes)} in {len(details.files)} files"),
            ("parameters", in_words(details.parameters) if details.parameters else "?"),
            ("context", f"{details.context_tokens} tokens" if details.context_tokens else "?"),
            ("licence", (details.license or "?") + (", gated" if details.gated else "")),
            ("runs here", "yes" if fit.can_run else f"no: {fit.reason}"),
            ("memory", _memory(fit)),
            (
                "drafters",
                ", ".join(drafters.copying) + (", layers" if drafters.own_layers else "") + f"; trained: {trained}",
            ),
            ("folder", details.local_path or f"not here; mlxspec download {details.id}"),
        ]
    )
    return ExitStatus.OK


def _memory(fit: "Fit") -> str:
    if fit.needed_bytes is None:
        return "?"
    return f"{in_binary_units(fit.needed_bytes)}, of {in_binary_units(fit.budget_bytes)} for all models"


def run_download(options: argparse.Namespace, output: Output) -> int:
    wish = Wish(
        id=options.id,
        revision=options.revision,
        quantize=options.quantize,
        group_size=options.group_size,
        force=options.force,
    )
    return download(wish, output)


def download(wish: Wish, output: Output, *, is_for_server: bool = False) -> int:
    """Fetch a model and tell of it; `is_for_server`: it is served at once, so there is less to say."""
    from router.hub.download import fetch  # slow to import

    store = Store()
    try:
        with showing(output, wish.name) as tell:
            path = fetch(wish, store, tell)
    except KeyboardInterrupt:
        output.note("stopped; what came is kept, the same command goes on from there")
        return ExitStatus.INTERRUPTED
    if is_for_server:
        return ExitStatus.OK
    tell_server(output)
    if output.is_json:
        output.json(store.describe(path))
    else:
        output.line(f"{wish.name} is in {path}")
        if output.is_terminal:
            output.note(f"mlxspec run {wish.name} talks to it")
    return ExitStatus.OK


def tell_server(output: Output) -> None:
    """Have a server that runs on the same store look for new models; none has to run."""
    try:
        connect(argparse.Namespace(url=None)).get("/hf/models/local")
    except NoServer:
        return
    except MlxspecError as error:
        output.note(f"the running server was not told of the new model: {error.message}")
