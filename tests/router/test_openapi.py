"""The OpenAPI document, and what a fuzzer that reads it finds: no answer of the server's is its own fault."""

import asyncio

import pytest

from router.openapi import BODIES
from tests import fuzz
from tests.fakes import Cluster, FakeWorker

FUZZ_TIMEOUT_S = 100 + fuzz.EXAMPLES * 4
ONE_SUCH = ("HEAD", "GET", "DELETE")
BODILESS = {"POST /reload"}


async def test_document_has_every_route_and_the_body_of_each_that_takes_one(cluster: Cluster) -> None:
    async with cluster.http.get("/openapi.json") as response:
        document = await response.json()
    async with cluster.http.get("/") as response:
        routes = (await response.json())["routes"]
    operations = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert operations == set(routes)
    assert {route for route in routes if route.partition(" ")[0] not in ONE_SUCH} == BODIES.keys() | BODILESS
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/GenerateBody"}
    assert document["components"]["schemas"]["GenerateBody"]["required"] == ["prompt"]


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_TIMEOUT_S + 20)
async def test_fuzzer_finds_no_fault_of_the_server(cluster: Cluster, worker: FakeWorker) -> None:
    """Positive and negative examples of every operation, the same ones in each run."""
    known = cluster.supervisor.models
    cluster.supervisor.on_ensure = lambda call: "" if call.name in known else "model_not_found"
    fuzzer = await asyncio.create_subprocess_exec(
        *fuzz.command(f"http://127.0.0.1:{cluster.port}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(FUZZ_TIMEOUT_S):
            output, _ = await fuzzer.communicate()
    finally:
        if fuzzer.returncode is None:
            fuzzer.kill()
    assert fuzzer.returncode == 0, output.decode()[-6000:]
    assert worker.generates
