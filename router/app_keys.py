"""What handlers find in the application."""

import time
from dataclasses import dataclass, field

from aiohttp import web

from common.config import Config
from common.keys import Keys
from router.backend import Backend
from router.hub.jobs import JobDesk
from router.hub.store import Store
from router.ledger import Ledger
from router.meters import Meters


@dataclass(slots=True)
class ServerState:
    """What the server does at the moment; `in_flight` counts HTTP requests that have not been answered."""

    started_s: float = field(default_factory=time.monotonic)
    started_at: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    in_flight: int = 0


@dataclass(slots=True)
class Hub:
    """The models on this machine, and the downloads under way."""

    store: Store = field(default_factory=Store)
    jobs: JobDesk = field(default_factory=JobDesk)


CONFIG = web.AppKey("config", Config)
KEYS = web.AppKey("keys", Keys)
BACKEND = web.AppKey("backend", Backend)
STATE = web.AppKey("state", ServerState)
LEDGER = web.AppKey("ledger", Ledger)
HUB = web.AppKey("hub", Hub)
METERS = web.AppKey("meters", Meters)
REQUEST_ID = web.RequestKey("request_id", str)
