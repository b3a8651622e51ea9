"""How urgent a request is: its class among those that wait for a row."""

from enum import IntEnum

from common.errors import InvalidValue


class Priority(IntEnum):
    """Classes of requests, served from high to low; within one, first come, first served."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


NAMES = {"low": Priority.LOW, "normal": Priority.NORMAL, "high": Priority.HIGH}
# OpenAI's word for it. Tiers that differ in price or capacity alone are all the same here.
SERVICE_TIERS = {
    "flex": Priority.LOW,
    "auto": Priority.NORMAL,
    "default": Priority.NORMAL,
    "scale": Priority.NORMAL,
    "priority": Priority.HIGH,
}


def to_priority(name: str, field: str = "priority", names: dict[str, Priority] = NAMES) -> Priority:
    """The class called `name`. Raises `InvalidValue` naming `field`."""
    if name not in names:
        shown = name if len(name) <= 20 else f"{name[:20]}…"
        raise InvalidValue(f"{field} is {shown!r}; possible: {', '.join(names)}", param=field)
    return names[name]
