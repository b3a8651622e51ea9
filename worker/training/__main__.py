"""`python -P -m worker.training VERB …`: what `mlxspec draft VERB …` runs."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import msgspec

from common import lifeline, paths
from common.errors import ConfigError
from worker import backend, kept_text
from worker.heads import folder
from worker.taps import NoLayers
from worker.training import report
from worker.training.build import WORK, Job, build, evaluate
from worker.training.given import BadText, read_prompts
from worker.training.plan import HELP, Plan, check

OK, DOES_NOT_PAY, CANNOT, NOT_FOUND, INTERRUPTED = 0, 1, 3, 5, 130


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 ok, 1 the head does not pay and is not used, 2 usage, 3 a model or file is wrong, 5 no
    such head."""
    options = _parser().parse_args(arguments)
    lifeline.watch()
    backend.prepare()
    try:
        return int(options.run(options))
    except (ConfigError, NoLayers, OSError) as error:
        if getattr(options, "json", False):
            _print_json({"error": {"code": getattr(error, "code", "failed"), "message": str(error)}})
        else:
            print(f"mlxspec draft: {error}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, folder.NoSuchHead) else CANNOT
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlxspec draft", description="Make and look after trained drafters.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    make = verbs.add_parser("build", help="make a head for a model from text that it writes itself")
    make.set_defaults(run=_build)
    make.add_argument("model", help="a model folder, a name in MLXSPEC_HOME/models, or a Hugging Face id")
    make.add_argument("--out", type=Path, help="folder of the head (default: MLXSPEC_HOME/drafts/NAME OF THE MODEL)")
    make.add_argument("--init", default=folder.HEAD, choices=(folder.HEAD, folder.LAYERS))
    make.add_argument("--prompts", type=Path, help="prompts to measure with: text, one a line, or .jsonl of Spec-Bench")
    make.add_argument("--training-prompts", type=Path, help="prompts that the model answers for its training text")
    make.add_argument("--served", action="store_true", help="train on what the model was asked and answered, too")
    make.add_argument("--weights", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    make.add_argument("--restart", action="store_true", help="drop an unfinished build instead of going on with it")
    make.add_argument("--keep-work", action="store_true", help="keep the text and the state of the training")
    make.add_argument("--json", action="store_true", help="progress goes to standard error")
    for name, default in msgspec.structs.asdict(Plan()).items():
        if name not in ("stages", "init"):
            option, told = f"--{name.replace('_', '-')}", HELP[name] + (f" (default: {default})" if default else "")
            make.add_argument(option, type=type(default), default=default, metavar="N", help=told)
    for verb, run, text in (("info", _info, "show a head's report"), ("rm", _remove, "delete a head")):
        one = verbs.add_parser(verb, help=text)
        one.set_defaults(run=run)
        one.add_argument("name")
        one.add_argument("--json", action="store_true")
    judge = verbs.add_parser("eval", help="measure a head again, here, and decide anew whether it is used")
    judge.set_defaults(run=_evaluate)
    judge.add_argument("name")
    judge.add_argument("--model", help="folder of its model (default: MLXSPEC_HOME/models/NAME OF THE MODEL)")
    judge.add_argument(
        "--prompts", type=Path, help="prompts to measure with: text, one a line, or .jsonl of Spec-Bench"
    )
    judge.add_argument("--weights", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    judge.add_argument("--json", action="store_true")
    listing = verbs.add_parser("list", help="show all heads")
    listing.set_defaults(run=_list)
    listing.add_argument("--json", action="store_true")
    return parser


def _build(options: argparse.Namespace) -> int:
    model = str(paths.models_dir() / options.model) if _is_name(options.model) else options.model
    suffix = "" if options.init == folder.HEAD else f"-{options.init}"
    out = (options.out or folder.heads_dir() / f"{Path(model).name}{suffix}").absolute()
    plan = Plan(**{name: getattr(options, name) for name in Plan.__struct_fields__ if name != "stages"})
    check(plan)
    if options.restart and (out / WORK).is_dir():
        shutil.rmtree(out / WORK)
    job = Job(
        model=model,
        out=out,
        plan=plan,
        weights=options.weights,
        prompts=read_prompts(options.prompts) if options.prompts else (),
        training_prompts=read_prompts(options.training_prompts) if options.training_prompts else (),
        served=_kept_text(options.model) if options.served else None,
        command=shlex.join(["mlxspec", "draft", *sys.argv[1:]]),
        keeps_work=options.keep_work,
    )
    made = build(job, lambda line: print(line, flush=True, file=sys.stderr if options.json else sys.stdout))
    if options.json:
        _print_json({"path": str(out), "is_used": made.is_used, "report": made})
        return OK if made.is_used else DOES_NOT_PAY
    print(report.summary(made.measured))
    if compared := report.comparison(made, out.name):
        print(compared)
    if not made.is_used:
        print("This drafter would not make the model faster: it is not used.", file=sys.stderr)
        return DOES_NOT_PAY
    print(f"The drafter is in {out} and is used from the model's next start on.")
    return OK


def _kept_text(model: str) -> Path:
    """The folder of the model's kept text. Raises `BadText`."""
    found = [kept_text.folder_of(name) for name in (model, Path(model).name)]
    kept = next((one for one in found if one.is_dir()), None)
    if kept is None:
        raise BadText(f"there is no kept text in {found[0]}: set keep_text = true in [models.NAME] and serve the model")
    return kept


def _list(options: argparse.Namespace) -> int:
    entries = folder.entries()
    if options.json:
        _print_json([_described(entry) for entry in entries])
        return OK
    for entry in entries:
        state = "used" if entry.is_used else "not used: it does not pay"
        print(f"{entry.name:32} {entry.config.kind:6} for {entry.config.target[:12]}  {state}  {entry.folder}")
    if not entries:
        print("there are no heads; make one with: mlxspec draft build MODEL", file=sys.stderr)
    return OK


def _info(options: argparse.Namespace) -> int:
    entry = _named(options.name)
    found = report.load(entry.folder)
    if options.json:
        _print_json(_described(entry) | {"report": found})
        return OK
    print(f"{found.command}\n{found.device}\n{found.written_tokens} tokens written, {found.train_tokens} trained on")
    print(report.history(found))
    print(report.summary(found.measured))
    if compared := report.comparison(found, entry.name):
        print(compared)
    return OK


def _evaluate(options: argparse.Namespace) -> int:
    entry = _named(options.name)
    model = options.model or str(paths.models_dir() / report.load(entry.folder).model)
    prompts = read_prompts(options.prompts) if options.prompts else ()
    made = evaluate(entry, model, options.weights, prompts)
    report.save(made, entry.folder)
    if options.json:
        _print_json(_described(entry) | {"is_used": made.is_used, "report": made})
        return OK if made.is_used else DOES_NOT_PAY
    print(report.summary(made.measured))
    if compared := report.comparison(made, entry.name):
        print(compared)
    return OK if made.is_used else DOES_NOT_PAY


def _described(entry: folder.Entry) -> dict[str, object]:
    return {"name": entry.name, "path": str(entry.folder), "is_used": entry.is_used, "config": entry.config}


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _remove(options: argparse.Namespace) -> int:
    entry = _named(options.name)
    folder.remove(entry)
    if options.json:
        _print_json({"name": entry.name, "path": str(entry.folder), "is_deleted": True})
        return OK
    print(f"the head {options.name} is deleted; models that run keep it until they are started anew")
    return OK


def _named(name: str) -> folder.Entry:
    found = next((entry for entry in folder.entries() if entry.name == name), None)
    if found is None:
        raise folder.NoSuchHead(f"there is no head named {name}; mlxspec draft list shows all")
    return found


def _is_name(model: str) -> bool:
    return (paths.models_dir() / model / "config.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
