"""The version of the installed distribution."""

import importlib.metadata

try:
    VERSION = importlib.metadata.version("mlxspec")
except importlib.metadata.PackageNotFoundError:  # run from a source tree
    VERSION = "0.0.0"
