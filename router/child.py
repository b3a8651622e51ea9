"""Child processes that need MLX, which only the worker's side may import."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from common import lifeline, openblas

STOP_S = 5.0


@contextlib.contextmanager
def running(
    module: str, arguments: Sequence[str], stdout: int | None = None, stderr: int | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """`python -m module arguments`, with OpenBLAS where there is one.

    The child ends with the block, and with this process, however that ends.
    """
    read_end, write_end = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, write_end)  # its end of file ends the child
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                env=openblas.with_preload() | {lifeline.VARIABLE: str(read_end)},
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                text=True,
                stdout=stdout,
                stderr=stderr,
            )
        finally:
            os.close(read_end)
        stack.callback(_end, child)
        yield child


def _end(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
            return
        child.kill()
        child.wait()
