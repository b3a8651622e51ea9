"""What the supervisor tells a worker on its command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Child:
    """A worker's identity on the bus, its model's name and path, and where the sockets and the configuration are."""

    identity: str
    name: str
    model: str
    run_dir: Path

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Child":
        parser = argparse.ArgumentParser(prog="python -m worker")
        for option in ("--identity", "--name", "--model", "--run-dir"):
            parser.add_argument(option, required=True)
        options = parser.parse_args(arguments)
        return cls(options.identity, options.name, options.model, Path(options.run_dir))
