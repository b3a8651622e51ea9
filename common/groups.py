"""Groups: several models under one name, and the rule by which a request gets one of them."""

from collections.abc import Mapping

import msgspec

from common.errors import InvalidRequest, InvalidValue

POLICIES = ("default", "prefer_loaded", "least_loaded")
MAX_MEMBERS = 64
MAX_DESCRIPTION_CHARS = 1000


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[groups.NAME]. `policy`: `default` takes the default model, `prefer_loaded` the first loaded one,
    `least_loaded` the one with the least work; without a default model the first of `models` is it.
    """

    models: tuple[str, ...]
    default_model: str | None = None
    description: str = ""
    policy: str = "default"

    @property
    def in_order(self) -> tuple[str, ...]:
        """Its members, the default one first."""
        first = self.default_model or self.models[0]
        return (first, *(name for name in self.models if name != first))


def check_group(group: Group) -> None:
    """Raise `InvalidRequest` or `InvalidValue` for a group that cannot work."""
    if not 0 < len(group.models) <= MAX_MEMBERS:
        raise InvalidValue(f"models has {len(group.models)} names; 1 to {MAX_MEMBERS} are allowed", param="models")
    if len(set(group.models)) < len(group.models):
        raise InvalidRequest("models names a model twice", param="models")
    if group.default_model is not None and group.default_model not in group.models:
        raise InvalidRequest(
            f"default_model is {group.default_model[:128]!r}; it must be one of the group's models",
            param="default_model",
        )
    if group.policy not in POLICIES:
        raise InvalidValue(f"policy is {group.policy[:64]!r}; possible: {', '.join(POLICIES)}", param="policy")
    if len(group.description) > MAX_DESCRIPTION_CHARS:
        raise InvalidValue(
            f"description has {len(group.description)} characters; at most {MAX_DESCRIPTION_CHARS} are allowed",
            param="description",
        )


def check_names(groups: Mapping[str, Group], aliases: Mapping[str, str]) -> None:
    """Check all groups, and that no name stands for two things or for an alias of an alias."""
    for group in groups.values():
        check_group(group)
    for name, target in aliases.items():
        if name in groups:
            raise InvalidRequest(f"{name!r} is both a group and an alias")
        if target in aliases:
            raise InvalidRequest(f"alias {name!r} stands for {target!r}, which is an alias itself")
