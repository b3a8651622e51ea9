"""`mlxspec groups`: several models under one name, of which a policy picks one for each request."""

import argparse
from collections.abc import Mapping
from typing import Any

from router.cli.client import Client, connect, quoted
from router.cli.output import ExitStatus, Output
from router.cli.verbs import MODELS, Verbs, add_choice, add_server

POLICIES = ("default", "prefer_loaded", "least_loaded")


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "groups",
        topic=MODELS,
        help="give several models one name",
        description="Groups of models. A group's name may stand wherever a model's may; its policy picks the member.",
        examples="mlxspec groups list\n"
        "mlxspec groups create chat small large --policy prefer_loaded\n"
        "mlxspec groups rm chat",
    )
    inner = Verbs(parser, dest="groups_command", is_required=True)
    add_server(inner.add("list", help="list the groups", examples="mlxspec groups list", run=run_list))
    show = inner.add("show", help="show one group", examples="mlxspec groups show chat", run=run_show)
    create = inner.add(
        "create",
        help="make a group",
        examples='mlxspec groups create chat small large --default large --description "for talking"',
        run=run_create,
    )
    change = inner.add(
        "set",
        help="change a group",
        description="Change a group; what is not given stays as it is.",
        examples="mlxspec groups set chat small large larger\nmlxspec groups set chat --policy least_loaded",
        run=run_set,
    )
    remove = inner.add("rm", help="remove a group, not its models", examples="mlxspec groups rm chat", run=run_rm)
    for verb in (show, create, change, remove):
        verb.add_argument("name", metavar="NAME", help="name of the group")
    create.add_argument("models", metavar="MODEL", nargs="+", help="its models")
    change.add_argument("models", metavar="MODEL", nargs="*", help="all its models, if they change")
    for verb in (create, change):
        verb.add_argument("--default", metavar="MODEL", dest="default_model", help="the member to prefer")
        verb.add_argument("--description", metavar="TEXT", help="what the group is for")
        add_choice(verb, "--policy", None, POLICIES, "whether the default member, a loaded one or the idlest answers")
    for verb in (show, create, change, remove):
        add_server(verb)


def run_list(options: argparse.Namespace, output: Output) -> int:
    groups = connect(options).get("/groups")["groups"]
    if output.is_json:
        output.json(groups)
    elif groups:
        rows = [(g["name"], ", ".join(g["models"]), g["default_model"] or "", g["policy"]) for g in groups]
        output.table(("name", "models", "default", "policy"), rows)
    else:
        output.note("there are no groups; make one with: mlxspec groups create NAME MODEL …")
    return ExitStatus.OK


def run_show(options: argparse.Namespace, output: Output) -> int:
    return _tell(connect(options).get(_path(options)), output)


def run_create(options: argparse.Namespace, output: Output) -> int:
    body = {"name": options.name, "models": options.models} | _given(options)
    return _tell(connect(options).call("POST", "/groups", body), output)


def run_set(options: argparse.Namespace, output: Output) -> int:
    client = connect(options)
    changes = ({"models": options.models} if options.models else {}) | _given(options)
    settings = _settings(client, options) | changes
    if "default_model" not in changes and settings["default_model"] not in settings["models"]:
        del settings["default_model"]  # it has left the group
    return _tell(client.call("PUT", _path(options), settings), output)


def run_rm(options: argparse.Namespace, output: Output) -> int:
    answer = connect(options).call("DELETE", _path(options))
    if output.is_json:
        output.json(answer)
    else:
        output.line(f"group {options.name} is removed; its models stay")
    return ExitStatus.OK


def _path(options: argparse.Namespace) -> str:
    return f"/groups/{quoted(options.name)}"


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("default_model", "description", "policy")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _settings(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    """What can be set of the group, as it is: a PUT replaces all of it."""
    group = client.get(_path(options))
    return {name: group[name] for name in ("models", "default_model", "description", "policy")}


def _tell(group: Mapping[str, Any], output: Output) -> int:
    if output.is_json:
        output.json(group)
    else:
        output.facts(
            [
                ("name", group["name"]),
                ("models", ", ".join(group["models"])),
                ("default", group["default_model"] or "–"),
                ("policy", group["policy"]),
                ("description", group["description"] or "–"),
            ]
        )
    return ExitStatus.OK
