"""The entry of a worker process: from the shell for one model, or as the supervisor's child."""

import faulthandler
import logging
import os
import sys
from collections.abc import Sequence

from common import lifeline, logs, openblas
from common.config import load_effective
from common.errors import MlxspecError
from common.states import ExitCode
from worker.child import Child

log = logging.getLogger("worker")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the supervisor's child if `--identity` is given, else as a tool in the foreground."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--identity" in arguments:
        sys.exit(serve(Child.parse(arguments)))
    _with_openblas(arguments)
    from worker import debug  # pulls mlx: not before the preload

    sys.exit(debug.main(arguments))


def serve(child: Child) -> int:
    """Load the model and answer requests until told to stop; returns the exit code."""
    config = load_effective(child.run_dir / "config.json")
    logs.setup(f"worker {child.identity}", config.log.level)
    lifeline.watch()
    faulthandler.enable()  # on SIGABRT, for a hang, it writes where all threads stand
    from worker.served import run  # pulls mlx

    try:
        run(child, config)
    except MlxspecError as error:
        log.error("%s", error)
        return ExitCode.BAD_MODEL
    except Exception as error:
        log.exception("The worker broke.")
        return ExitCode.OUT_OF_MEMORY if _is_out_of_memory(error) else ExitCode.CRASH
    return ExitCode.OK


def _with_openblas(arguments: Sequence[str]) -> None:
    """Start this process again with OpenBLAS preloaded, where there is one and it is not yet."""
    environment = openblas.with_preload()
    if environment.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, "-P", "-m", "worker", *arguments], environment)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error).lower()
