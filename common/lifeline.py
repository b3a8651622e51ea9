"""Death watch: a child ends when its supervisor does, however that died.

The supervisor alone holds the write end of a pipe; each child inherits the read end and waits for its end of file.
"""

import os
import threading
from collections.abc import Callable

VARIABLE = "MLXSPEC_LIFELINE_FD"


def watch(on_orphaned: Callable[[], None] = lambda: os._exit(1)) -> None:
    """Start a thread that calls `on_orphaned` when the supervisor is gone. Without a supervisor: nothing."""
    descriptor = os.environ.get(VARIABLE)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)
        on_orphaned()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
