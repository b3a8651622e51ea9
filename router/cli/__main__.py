"""`python -m router.cli`: the same as `mlxspec`."""

import sys

from router.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
