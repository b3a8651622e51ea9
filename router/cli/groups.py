"""Verbs for groups of models, which the running server keeps."""

import argparse
from typing import Any

from router.cli.client import connect, quoted
from router.cli.output import ExitStatus, Output
from router.cli.verbs import MODELS, Verbs, add_server

POLICIES = ("default", "prefer_loaded", "least_loaded")


def add_verbs(verbs: Verbs) -> None:
    groups = verbs.add(
        "groups",
        topic=MODELS,
        help="name several models as one",
        description="Groups of models: a request that names a group goes to one of its models.",
        examples="mlxspec groups create llama llama-8b llama-1b --default llama-8b\nmlxspec groups list",
    )
    inner = Verbs(groups, dest="action", is_required=True)
    add_server(inner.add("list", help="list all groups", run=run_list))
    show = inner.add("show", help="show one group", run=run_show)
    show.add_argument("name", metavar="NAME")
    add_server(show)
    create = inner.add("create", help="make a group", run=run_create)
    set_verb = inner.add("set", help="make a group, or make it anew", run=run_set)
    for parser in (create, set_verb):
        parser.add_argument("name", metavar="NAME")
        parser.add_argument("models", metavar="MODEL", nargs="+")
        parser.add_argument("--default", metavar="MODEL", help="the one that answers by default (default: the first)")
        parser.add_argument("--policy", choices=POLICIES, help="who answers (default: default)")
        parser.add_argument("--description", metavar="TEXT")
        add_server(parser)
    remove = inner.add("rm", help="take a group away; its models stay", run=run_rm)
    remove.add_argument("name", metavar="NAME")
    add_server(remove)


def run_list(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).get("/groups")
    if output.is_json:
        output.json(answer)
        return ExitStatus.OK
    columns = ("group", "models", "default", "policy", "description")
    output.table(columns, [_row(group) for group in answer["groups"]])
    if output.is_terminal and not answer["groups"]:
        output.note("no groups; mlxspec groups create NAME MODEL ... makes one")
    return ExitStatus.OK


def run_show(options: argparse.Namespace, output: Output) -> int:
    return _show(connect(options).get(f"/groups/{quoted(options.name)}"), output)


def run_create(options: argparse.Namespace, output: Output) -> int:
    return _show(connect(options).call("POST", "/groups", {"name": options.name, **_body(options)}), output)


def run_set(options: argparse.Namespace, output: Output) -> int:
    return _show(connect(options).call("PUT", f"/groups/{quoted(options.name)}", _body(options)), output)


def run_rm(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("DELETE", f"/groups/{quoted(options.name)}")
    if output.is_json:
        output.json(answer)
    else:
        output.line(f"group {options.name} is gone")
    return ExitStatus.OK


def _body(options: argparse.Namespace) -> dict[str, Any]:
    given = {"default_model": options.default, "policy": options.policy, "description": options.description}
    return {"models": options.models} | {key: value for key, value in given.items() if value is not None}


def _show(group: dict[str, Any], output: Output) -> int:
    if output.is_json:
        output.json(group)
    else:
        names = ("group", "models", "default", "policy", "description")
        output.facts(list(zip(names, _row(group), strict=True)))
    return ExitStatus.OK


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    models = ", ".join(group.get("models") or ())
    return (group["name"], models, *(str(group.get(key) or "") for key in ("default_model", "policy", "description")))
