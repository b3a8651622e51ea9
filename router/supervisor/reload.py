"""What a changed configuration asks for: pure, so that `mlxspec reload` can say it and the fleet can do it."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from common import config as configuration
from common.config import Config, ModelConfig

LIVE_SECTIONS = ("default_model", "supervisor", "engine", "speculation", "models")
WORKER_SECTIONS = ("engine", "speculation")  # read by a worker when it starts
SUPERVISED_KEYS = ("preload", "pin", "replicas", "idle_unload_s")  # of a model; its worker need not know them


@dataclass(frozen=True, slots=True)
class Change:
    """The configuration that holds from now on, whom it concerns, and what waits for the next start of the server."""

    config: Config
    added: tuple[str, ...]
    removed: tuple[str, ...]
    restarts_all: bool  # a setting that all workers read has changed
    restarted: tuple[str, ...]  # else those whose workers finish and are started anew
    adjusted: tuple[str, ...]  # only the supervisor treats them otherwise
    keys: tuple[str, ...]  # other keys that changed at once
    waiting: tuple[str, ...]  # keys that need a restart of the server

    def lines(self) -> list[str]:
        """What changed, one thing a line; one line when nothing did."""
        told = [
            *(f"added model {name}" for name in self.added),
            *(f"removed model {name}" for name in self.removed),
            *(["restarts all loaded models when their requests are done"] if self.restarts_all else []),
            *(f"restarts model {name}, if it is loaded, when its requests are done" for name in self.restarted),
            *(f"adjusted model {name}" for name in self.adjusted),
            *(f"changed {key}" for key in self.keys),
            *(f"not changed until the server is restarted: {key}" for key in self.waiting),
        ]
        return told or ["nothing has changed"]


def compare(old: Config, new: Config) -> Change:
    """What it takes to get from `old`, which holds, to `new`."""
    fields = msgspec.structs.asdict(old)
    live = {key: getattr(new, key) for key in LIVE_SECTIONS}
    config = msgspec.structs.replace(old, **live)
    changed = [n for n in new.models if n in old.models and old.models[n] != new.models[n]]
    restarted = [n for n in changed if differ_for_workers(old.models[n], new.models[n])]
    return Change(
        config=config,
        added=tuple(name for name in new.models if name not in old.models),
        removed=tuple(name for name in old.models if name not in new.models),
        restarts_all=any(getattr(old, key) != getattr(new, key) for key in WORKER_SECTIONS),
        restarted=tuple(restarted),
        adjusted=tuple(name for name in changed if name not in restarted),
        keys=tuple(_changed_keys(old, new, [key for key in LIVE_SECTIONS if key != "models"])),
        waiting=tuple(_changed_keys(old, new, [key for key in fields if key not in LIVE_SECTIONS])),
    )


def differ_for_workers(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether a worker that runs with the one would run otherwise with the other."""
    return _for_worker(old) != _for_worker(new)


def _for_worker(model: ModelConfig) -> ModelConfig:
    usual = msgspec.structs.asdict(ModelConfig(path=""))
    return msgspec.structs.replace(
        model,
        path=configuration.resolve_model_path(model.path),
        **{key: usual[key] for key in SUPERVISED_KEYS},
    )


def _changed_keys(old: Config, new: Config, sections: list[str]) -> Iterator[str]:
    for section in sections:
        before, after = getattr(old, section), getattr(new, section)
        if before == after:
            continue
        if not isinstance(before, msgspec.Struct):
            yield section
            continue
        values = msgspec.structs.asdict(after)
        yield from (f"{section}.{k}" for k, v in msgspec.structs.asdict(before).items() if values[k] != v)
