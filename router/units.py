"""Numbers for the eye: files in decimal units, as the hub counts them, memory in binary ones, as the settings do."""


def in_units(size_bytes: float) -> str:
    """The size of files: 1.2 GB."""
    return _scaled(size_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def in_binary_units(size_bytes: float) -> str:
    """An amount of memory: 1.2 GiB."""
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def in_words(count: float) -> str:
    """How many: 1.2 billion."""
    return _scaled(count, 1000, ("", "thousand", "million", "billion", "trillion")).rstrip()


def age(seconds: float) -> str:
    """A time span in its two largest units at most."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    """With one decimal below 100, where the unit is not the first."""
    first, *_, last = units
    for unit in units:
        if value < 999.5 or unit == last:
            break
        value /= step
    return f"{value:.0f} {unit}" if unit == first or value >= 99.95 else f"{value:.1f} {unit}"
