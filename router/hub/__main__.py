"""`python -P -m router.hub WISH`: one download as a process of its own, so that it can be cancelled at any moment.

WISH is JSON (`download.Wish`). Each line on standard output is JSON: `{"progress": {…}}`, and last `{"path": …}` or
`{"error": {"code": …, "message": …}}`.
"""

import signal
import sys
import threading

import msgspec

from common import lifeline
from common.errors import MlxspecError
from router.hub.download import fetch
from router.hub.jobs import Line, LineError
from router.hub.store import Store
from router.hub.wishes import Progress, Wish


def main() -> int:
    lifeline.watch()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wish = msgspec.json.decode(sys.argv[1], type=Wish)
    lock = threading.Lock()

    def say(line: Line) -> None:
        with lock:
            sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
            sys.stdout.buffer.flush()

    def tell(progress: Progress) -> None:
        say(Line(progress=progress))

    try:
        say(Line(path=str(fetch(wish, Store(), tell))))
    except MlxspecError as error:
        say(Line(error=LineError(code=error.code, message=error.message)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
