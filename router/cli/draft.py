"""`mlxspec draft`: heads that draft for a model. The work needs MLX and is done by a child process."""

import argparse

from router import child as child_process
from router.cli.output import ExitStatus, Output
from router.cli.verbs import MODELS, Parser, Verbs, add_choice, add_json

MODULE = "worker.training"
WEIGHTS = ("auto", "float32", "bfloat16", "float16")
# The child knows the defaults. "N" are whole numbers.
BUDGET = (
    ("--minutes", "M", "of writing and training together (default: 10)"),
    ("--tokens", "N", "end writing after so many tokens"),
    ("--steps", "N", "end training after so many steps"),
)
SIZES = (
    ("--writing-share", "X", "share of the time that goes to writing (default: 0.35)"),
    ("--rows", "N", "conversations that are written at once (default: 16)"),
    ("--length", "N", "tokens of a conversation (default: 256)"),
    ("--batch-rows", "N", "conversations of a training step (default: 4)"),
    ("--vocabulary", "N", "tokens that the head can draft (default: 16384)"),
    ("--layers", "N", "layers of the head (default: 1)"),
    ("--keep-ratio", "X", "share of the model's layers that --init layers keeps (default: 0.5)"),
    ("--rank", "N", "of the adapters of --init layers (default: 16)"),
    ("--mlp-ratio", "X", "size of its MLP, of the model's own (default: 1)"),
    ("--matrix-rate", "X", "learning rate of matrices (default: 0.02)"),
    ("--vector-rate", "X", "learning rate of the rest (default: 0.001)"),
    ("--seed", "N", "of the text and the first weights (default: 0)"),
)


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "draft",
        topic=MODELS,
        help="make a drafter for a model, from text that it writes itself",
        description="Heads that draft for a model. A model's next start finds its head by itself.",
        examples="mlxspec draft build smollm2-135m --minutes 10\nmlxspec draft list\nmlxspec draft rm smollm2-135m",
    )
    inner = Verbs(parser, dest="draft_command", is_required=True)
    _add_build(inner)
    listing = inner.add("list", help="list the heads", examples="mlxspec draft list --json", run=run_list)
    info = inner.add(
        "info", help="show how a head was made and measured", examples="mlxspec draft info smollm2-135m", run=run_info
    )
    judge = inner.add(
        "eval",
        help="measure a head on this machine",
        description="Measure a head on this machine, and decide anew whether it is used. Exit code 1: it does not pay.",
        examples="mlxspec draft eval smollm2-135m --prompts my-prompts.txt",
        run=run_eval,
    )
    remove = inner.add("rm", help="delete a head", examples="mlxspec draft rm smollm2-135m", run=run_rm)
    for verb in (info, judge, remove):
        verb.add_argument("name", metavar="NAME", help="as `mlxspec draft list` shows it")
    judge.add_argument("--model", metavar="MODEL", help="folder of its model (default: the one in the store)")
    _add_measuring(judge)
    for verb in (listing, info, judge, remove):
        add_json(verb)


def _add_build(verbs: Verbs) -> None:
    build = verbs.add(
        "build",
        help="make a head for a model",
        description="Make a head: the model writes conversations, the head learns from them, and is measured. No data "
        "set is needed. A build that was stopped goes on when the command is given again. Exit code 1: the head is no "
        "gain and is not used.",
        examples="mlxspec draft build smollm2-135m --minutes 10\n"
        "mlxspec draft build ./my-model --out ./my-head --prompts my-prompts.txt",
        run=run_build,
    )
    build.add_argument("model", metavar="MODEL", help="a name in the store, a model folder, or an id of Hugging Face")
    build.add_argument(
        "--out", metavar="DIR", help="the head's folder (default: MLXSPEC_HOME/drafts/NAME, or NAME-layers)"
    )
    for name, metavar, text in BUDGET:
        build.add_argument(name, metavar=metavar, type=_type(metavar), help=text)
    build.add_argument(
        "--init",
        choices=("head", "layers"),
        help="head: a new layer on the model's hidden states; layers: some of the model's own, healed by adapters. "
        "Both may be there; the report compares them (default: head)",
    )
    build.add_argument("--restart", action="store_true", help="drop an unfinished build instead of going on with it")
    build.add_argument("--keep-work", action="store_true", help="keep the text and the state of the training")
    build.add_argument(
        "--training-prompts",
        metavar="FILE",
        help="prompts that the model also answers in its text; those in --prompts are held out",
    )
    build.add_argument("--served", action="store_true", help="train on kept text, too (keep_text in the configuration)")
    _add_measuring(build)
    add_json(build)
    sizes = build.add_argument_group("sizes and rates")
    for name, metavar, text in SIZES:
        sizes.add_argument(name, metavar=metavar, type=_type(metavar), help=text)


def _add_measuring(parser: Parser) -> None:
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts to measure with: one a line, or .jsonl of Spec-Bench"
    )
    # Without a default: the child has one.
    add_choice(parser, "--weights", None, WEIGHTS, "number format of the model meanwhile, auto if not given")


def run_build(options: argparse.Namespace, output: Output) -> int:
    numbers = [name for name, _, _ in (*BUDGET, *SIZES)]
    given = _given(options, ["--out", "--init", *numbers, "--prompts", "--training-prompts", "--weights"])
    flags = [name for name in ("--restart", "--keep-work", "--served") if getattr(options, _field(name))]
    return _run(["build", *given, *flags, *_json(options), "--", options.model], output)


def run_eval(options: argparse.Namespace, output: Output) -> int:
    given = _given(options, ["--model", "--prompts", "--weights"])
    return _run(["eval", *given, *_json(options), "--", options.name], output)


def run_list(options: argparse.Namespace, output: Output) -> int:
    return _run(["list", *_json(options)], output)


def run_info(options: argparse.Namespace, output: Output) -> int:
    return _run(["info", *_json(options), "--", options.name], output)


def run_rm(options: argparse.Namespace, output: Output) -> int:
    return _run(["rm", *_json(options), "--", options.name], output)


def _run(arguments: list[str], output: Output) -> int:
    """The child's exit code; it prints by itself. A build takes as long as it takes: only its end is waited for."""
    with child_process.running(MODULE, arguments) as child:
        status = child.wait()
    if status < 0:
        hint = "; out of memory, perhaps" if status == -9 else ""
        again = "; the same command goes on where it was" if arguments[0] == "build" else ""
        output.note(f"mlxspec draft: ended by signal {-status}{hint}{again}")
        return ExitStatus.FAILED
    return status


def _given(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Those of the options that were given, for the child."""
    return [f"{name}={value}" for name in names if (value := getattr(options, _field(name))) is not None]


def _json(options: argparse.Namespace) -> list[str]:
    return ["--json"] if options.json else []


def _type(metavar: str) -> type[int] | type[float]:
    return int if metavar == "N" else float


def _field(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")
