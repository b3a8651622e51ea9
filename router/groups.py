"""Groups and aliases over HTTP."""

from aiohttp import web

from common.errors import Conflict, InvalidRequest, InvalidValue, NotFound
from common.groups import Group, check_group
from router.answers import Answer, json_response
from router.app_keys import BACKEND
from router.body import read_body
from router.models import NAME
from router.schemas import AliasBody, GroupBody, NamedGroupBody


class GroupAnswer(Answer, frozen=True, kw_only=True):
    """`default_model` is the one that the policy `default` takes."""

    name: str
    models: tuple[str, ...]
    default_model: str
    description: str
    policy: str


class GroupsAnswer(Answer, frozen=True, kw_only=True):
    groups: list[GroupAnswer]


class AliasAnswer(Answer, frozen=True, kw_only=True):
    name: str
    model: str


class AliasesAnswer(Answer, frozen=True, kw_only=True):
    aliases: list[AliasAnswer]


class DeletedAnswer(Answer, frozen=True, kw_only=True):
    name: str
    deleted: bool = True


async def list_all(request: web.Request) -> web.Response:
    groups = request.app[BACKEND].names.groups
    return json_response(GroupsAnswer(groups=[_answer(name, group) for name, group in sorted(groups.items())]))


async def show(request: web.Request) -> web.Response:
    groups, name = request.app[BACKEND].names.groups, request.match_info["name"]
    if name not in groups:
        raise NotFound(f"group {name[:128]!r} does not exist; there are: {', '.join(sorted(groups)) or 'none'}")
    return json_response(_answer(name, groups[name]))


async def create(request: web.Request) -> web.Response:
    body = await read_body(request, NamedGroupBody)
    if body.name in request.app[BACKEND].names.groups:
        raise Conflict(f"group {body.name!r} exists; PUT /groups/{body.name} changes it", param="name")
    return json_response(await _put(request, body.name, body), status=201)


async def put(request: web.Request) -> web.Response:
    """Make a group, or make it anew."""
    return json_response(await _put(request, request.match_info["name"], await read_body(request, GroupBody)))


async def delete(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    request.app[BACKEND].names.delete_group(name)
    return json_response(DeletedAnswer(name=name))


async def list_aliases(request: web.Request) -> web.Response:
    aliases = sorted(request.app[BACKEND].names.aliases.items())
    return json_response(AliasesAnswer(aliases=[AliasAnswer(name=name, model=model) for name, model in aliases]))


async def put_alias(request: web.Request) -> web.Response:
    """Another name for a model or a group."""
    name, body = request.match_info["name"], await read_body(request, AliasBody)
    await _check_name(request, name)
    names, directory = request.app[BACKEND].names, request.app[BACKEND].directory
    if body.model in names.aliases:
        raise InvalidRequest(f"model is {body.model[:128]!r}, which is an alias itself", param="model")
    if body.model not in names.groups:
        directory.named(body.model)
    names.put_alias(name, body.model)
    return json_response(AliasAnswer(name=name, model=body.model))


async def delete_alias(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    request.app[BACKEND].names.delete_alias(name)
    return json_response(DeletedAnswer(name=name))


async def _put(request: web.Request, name: str, body: GroupBody) -> GroupAnswer:
    await _check_name(request, name)
    group = Group(
        models=tuple(body.models),
        default_model=body.default_model,
        description=body.description,
        policy=body.policy,
    )
    check_group(group)
    for member in group.models:
        request.app[BACKEND].directory.named(member)
    request.app[BACKEND].names.put_group(name, group)
    return _answer(name, group)


async def _check_name(request: web.Request, name: str) -> None:
    if not NAME.fullmatch(name) or ".." in name:
        raise InvalidValue(f"name is {name[:128]!r}; it must match {NAME.pattern} without '..'", param="name")
    await request.app[BACKEND].known_table()
    if request.app[BACKEND].directory.find(name):
        raise Conflict(f"{name!r} is a model's name", param="name")


def _answer(name: str, group: Group) -> GroupAnswer:
    return GroupAnswer(
        name=name,
        models=group.models,
        default_model=group.in_order[0],
        description=group.description,
        policy=group.policy,
    )
