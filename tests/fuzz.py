"""Schemathesis on a running server: right and wrong requests to every operation of its OpenAPI document."""

import os
import sys

EXAMPLES = int(os.environ.get("MLXSPEC_FUZZ_EXAMPLES", "8"))  # of an operation; by hand: 500


def command(url: str, examples: int = EXAMPLES) -> list[str]:
    """Ends with 0 if no answer is the server's own fault. The same requests in each run."""
    return [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{url}/openapi.json",
        "--checks=not_a_server_error",
        "--mode=all",
        # What asks Hugging Face answers 503 where there is no network, as it should.
        "--exclude-path-regex=^/hf/models/(search|download|popular|.*/info)$",
        "--phases=fuzzing",
        f"--max-examples={examples}",
        "--request-timeout=10",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
    ]
