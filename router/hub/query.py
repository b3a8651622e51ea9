"""What can be looked for on the hub: light, for those that only pass it on."""

import msgspec

from common.errors import InvalidValue

SORTS = ("downloads", "likes", "trending_score", "last_modified", "created_at")
TASKS = ("text-generation", "any")
MAX_RESULTS = 100


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to look for. `library` "mlx" alone, "any" for all; by default MLX models come first.

    `max_size_gb` counts the files' bytes; models of unknown size are left out by it.
    """

    query: str = ""
    task: str = "text-generation"
    library: str = "mlx-first"
    sort: str = "downloads"
    license: str | None = None
    max_size_gb: float | None = None
    limit: int = 20


def check_query(query: Query) -> None:
    """Raise `InvalidValue` for what cannot be looked for."""
    if query.sort not in SORTS:
        raise InvalidValue(f"sort is {query.sort!r}; possible: {', '.join(SORTS)}", param="sort")
    if query.task not in TASKS:
        raise InvalidValue(f"task is {query.task!r}; possible: {', '.join(TASKS)}", param="task")
    if query.library not in ("mlx", "mlx-first", "any"):
        raise InvalidValue(f"library is {query.library!r}; possible: mlx, mlx-first, any", param="library")
    if not 1 <= query.limit <= MAX_RESULTS:
        raise InvalidValue(f"limit is {query.limit}; it must lie in [1, {MAX_RESULTS}]", param="limit")
    if query.max_size_gb is not None and not query.max_size_gb > 0:
        raise InvalidValue(f"max_size_gb is {query.max_size_gb}; it must be positive", param="max_size_gb")
    if len(query.query) > 200:
        raise InvalidValue(f"query has {len(query.query)} characters; at most 200 are allowed", param="query")
