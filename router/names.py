"""Names beside those of models: groups and aliases, from the configuration and over HTTP, and what else is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from common import saved_state
from common.config import Config
from common.errors import Conflict, ModelNotFound, NotFound
from common.groups import Group
from common.messages import ModelEntry
from common.saved_state import Saved
from common.states import WorkerState


class Names:
    """Groups and aliases. What the configuration says stands; the rest can be changed and is saved at once."""

    def __init__(self, config: Config, path: Path) -> None:
        self._config = config
        self._path = path
        self._saved = saved_state.load(path)

    @property
    def groups(self) -> dict[str, Group]:
        return self._saved.groups | self._config.groups

    @property
    def aliases(self) -> dict[str, str]:
        return self._saved.aliases | self._config.aliases

    def put_group(self, name: str, group: Group) -> None:
        self._check_free(name, self._config.groups, self.aliases)
        self._save(groups=self._saved.groups | {name: group})

    def delete_group(self, name: str) -> None:
        self._check_known(name, self.groups, "group")
        self._check_free(name, self._config.groups, {})
        self._save(groups=_without(self._saved.groups, name))

    def put_alias(self, name: str, target: str) -> None:
        self._check_free(name, self._config.aliases, self.groups)
        self._save(aliases=self._saved.aliases | {name: target})

    def delete_alias(self, name: str) -> None:
        self._check_known(name, self.aliases, "alias")
        self._check_free(name, self._config.aliases, {})
        self._save(aliases=_without(self._saved.aliases, name))

    def remember_model(self, name: str, path: str) -> None:
        self._save(models=self._saved.models | {name: path})

    def remember_pin(self, name: str, *, is_pinned: bool) -> None:
        self._save(pins=self._saved.pins | {name: is_pinned})

    def _check_known(self, name: str, known: Mapping[str, object], kind: str) -> None:
        if name not in known:
            raise NotFound(f"{kind} {name[:128]!r} does not exist; there are: {', '.join(sorted(known)) or 'none'}")

    def _check_free(self, name: str, configured: Mapping[str, object], others: Mapping[str, object]) -> None:
        if name in configured:
            raise Conflict(f"{name!r} stands in the configuration file; change it there")
        if name in others:
            raise Conflict(f"{name!r} is the name of something else already")

    def _save(self, **changes: object) -> None:
        changed: Saved = msgspec.structs.replace(self._saved, **changes)
        saved_state.save(changed, self._path)
        self._saved = changed


def choose(name: str, group: Group, models: Sequence[ModelEntry], owed: Mapping[str, int]) -> ModelEntry:
    """The member of `group` that gets a request (pure). `owed`: outstanding tokens by model.

    One that has failed is chosen only when all have. Raises `ModelNotFound` when none of them is known.
    """
    by_name = {model.name: model for model in models}
    known = [by_name[member] for member in group.in_order if member in by_name]
    if not known:
        raise ModelNotFound(f"group {name!r} has no known model; it names: {', '.join(group.models)}", param="model")
    hopeful = [model for model in known if model.state not in (WorkerState.FAILED, WorkerState.BACKOFF)] or known
    match group.policy:
        case "prefer_loaded":
            return min(hopeful, key=_is_not_ready)  # the first of equals
        case "least_loaded":
            return min(hopeful, key=lambda model: (owed.get(model.name, 0), _is_not_ready(model)))
        case _:
            return hopeful[0]


def _is_not_ready(model: ModelEntry) -> bool:
    return model.state is not WorkerState.READY


def _without(items: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in items.items() if key != name}
