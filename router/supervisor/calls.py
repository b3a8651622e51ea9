"""What clients of the control socket ask for, and the answers they get."""

import logging
from collections.abc import Callable
from pathlib import Path

from common import config as configuration
from common.config import ModelConfig
from common.errors import Conflict, InvalidRequest, MlxspecError, ModelNotFound, ModelUnavailable
from common.logs import fields
from common.messages import EnsureModel, Pin, Reload, Reply, Status, Unload
from common.states import WorkerState
from router.supervisor.bulletin import Post
from router.supervisor.fleet import Fleet
from router.supervisor.model import Model

log = logging.getLogger(__name__)

Call = EnsureModel | Unload | Pin | Reload | Status


class CallDesk:
    """Answers calls: at once, or for `Unload` when the process is gone."""

    def __init__(self, fleet: Fleet, post: Post, reload: Callable[[], list[str]]) -> None:
        self._fleet = fleet
        self._post = post
        self._reload = reload

    def answer(self, sender: str, call: Call) -> None:
        """Do what is asked; an error of ours goes back to the caller by its code."""
        try:
            reply = self._carry_out(sender, call)
        except MlxspecError as error:
            reply = Reply(call_id=call.call_id, code=error.code, message=error.message)
        self._fleet.settle()  # so that the caller has the table in which the answer is true before the answer
        if reply is not None:
            self._post.send(sender, reply)

    def _carry_out(self, sender: str, call: Call) -> Reply | None:
        match call:
            case EnsureModel():
                self._ensure(call)
            case Unload():
                self._unload(sender, call)
                return None
            case Pin():
                self._pin(call)
            case Reload():
                return Reply(call_id=call.call_id, message="\n".join(self._reload()))
            case Status():
                self._fleet.discover()
                return Reply(call_id=call.call_id, message=self._describe())
        return Reply(call_id=call.call_id)

    def _ensure(self, call: EnsureModel) -> None:
        model = self._registered(call.name, call.path) if call.path else self._known(call.name)
        if model.state is WorkerState.FAILED:
            if not call.path and not self._fleet.has_changed(model):
                raise ModelUnavailable(f"model {model.name} cannot be loaded: {model.detail}")
            self._fleet.reconsider(model)
        self._fleet.want(model)

    def _registered(self, name: str, path: str) -> Model:
        resolved = configuration.resolve_model_path(path)
        if not Path(resolved).is_dir() and not _looks_like_hub_id(path):
            raise ModelNotFound(f"{path} is neither a model folder (with a config.json) nor a Hugging Face id")
        self._fleet.discover()
        model = self._fleet.models.get(name)
        if model is None:
            return self._fleet.register(name, ModelConfig(path=resolved))
        if model.path != resolved:
            if model.has_process:
                raise Conflict(f"model {name} is loaded from {model.path}: unload it first")
            model.path = resolved
        return model

    def _unload(self, sender: str, call: Unload) -> None:
        model = self._known(call.name)
        reply = Reply(call_id=call.call_id)

        def tell() -> None:
            self._post.send(sender, reply)

        model.on_gone.append(tell)
        self._fleet.unload(model)

    def _pin(self, call: Pin) -> None:
        model = self._known(call.name)
        model.pinned = call.pinned
        log.info("pin changed %s", fields(model=model.name, pinned=call.pinned))
        if call.pinned and model.state is not WorkerState.FAILED:
            self._fleet.want(model, for_ever=True)
        self._fleet.nudge()

    def _known(self, name: str) -> Model:
        if not name:
            raise InvalidRequest("the model's name is empty")
        if name not in self._fleet.models:
            self._fleet.discover()
        try:
            return self._fleet.models[name]
        except KeyError:
            known = ", ".join(sorted(self._fleet.models)) or "none"
            raise ModelNotFound(f"model {name!r} is not known; known models: {known}") from None

    def _describe(self) -> str:
        lines = [_describe_model(model) for model in self._fleet.models.values()]
        return "\n".join(["supervisor is alive", *lines])


def _describe_model(model: Model) -> str:
    beat = model.best.heartbeat
    pulse = f" phase={beat.phase} loop_seq={beat.loop_seq}" if beat else ""
    return f"{model.name} {model.state} restarts={model.restarts.total()}{pulse} {model.detail}".rstrip()


def _looks_like_hub_id(path: str) -> bool:
    owner, slash, name = path.partition("/")
    return bool(owner and slash and name) and "/" not in name and not path.startswith((".", "~"))
