"""Brings a changed configuration to the fleet: models that it does not concern go on as they are."""

from common import config as configuration
from common.config import ModelConfig
from router.supervisor.fleet import Fleet
from router.supervisor.model import Model
from router.supervisor.reload import Change, differ_for_workers


def reconfigure(fleet: Fleet, change: Change) -> None:
    """Take it over. Workers that would run otherwise now finish their requests and are started anew."""
    fleet.config = change.config
    fleet.budget.configure(change.config)
    found = configuration.discover_models(change.config)
    for name, settings in found.items():
        if model := fleet.models.get(name):
            _adopt(fleet, model, settings, must_restart=change.restarts_all)
        else:
            _keep_loaded(fleet, fleet.register(name, settings))
    for name in change.removed:
        if model := fleet.models.get(name):
            model.is_removed = name not in found  # its folder may be there without an entry
            fleet.unload(model)
    fleet.default_model = configuration.default_model(change.config, found)
    fleet.nudge()


def _adopt(fleet: Fleet, model: Model, settings: ModelConfig, *, must_restart: bool) -> None:
    before, model.settings = model.settings, settings
    model.path = configuration.resolve_model_path(settings.path)
    model.is_removed = False
    model.resize(settings.replicas)
    if settings.pin is not before.pin:
        model.pinned = settings.pin  # else what a client has said holds
    if must_restart or differ_for_workers(before, settings):
        model.measured_bytes = 0
        fleet.reconsider(model)
        fleet.renew(model)
    if not (before.pin or before.preload):
        _keep_loaded(fleet, model)


def _keep_loaded(fleet: Fleet, model: Model) -> None:
    if model.settings.pin or model.settings.preload:
        fleet.want(model, for_ever=True)
