"""Who may ask: keys and their scopes, names of the server, pages of other sites."""

import pytest

from common.config import Config, ServerConfig
from common.keys import Keys, Scope
from router import access
from router.routes import ROUTES
from tests.fakes import Cluster, running_cluster

USER, ADMIN = "user-key-of-a-test", "admin-key-of-a-test"
KEYS = Keys(((USER.encode(), Scope.USER), (ADMIN.encode(), Scope.ADMIN)))
PAGE = "https://chat.example.org"


async def status(cluster: Cluster, method: str, path: str, **headers: str) -> int:
    async with cluster.http.request(method, path, json=None if method == "GET" else {}, headers=headers) as response:
        return response.status


async def test_every_route_but_two_needs_a_key() -> None:
    async with running_cluster(keys=KEYS) as cluster:
        await cluster.serve_model("tiny#1")
        for route in ROUTES:
            path = route.path.replace("{name:.+}", "tiny").replace("{name}", "tiny")
            expected = {"/livez": 200, "/readyz": 200}.get(path, 401)
            assert await status(cluster, route.method, path) == expected, path
        assert await status(cluster, "GET", "/no/such/route") == 401
        async with cluster.http.get("/models") as response:
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["code"] == "invalid_api_key"


async def test_key_comes_in_either_header_and_only_whole() -> None:
    async with running_cluster(keys=KEYS) as cluster:
        await cluster.serve_model("tiny#1")
        for headers, expected in [
            ({"Authorization": f"Bearer {USER}"}, 200),
            ({"Authorization": f"bearer {ADMIN}"}, 200),
            ({"x-api-key": USER}, 200),
            ({"Authorization": f"Basic {USER}"}, 401),
            ({"Authorization": f"Bearer {USER}x"}, 401),
            ({"Authorization": "Bearer "}, 401),
            ({"x-api-key": USER[:-1]}, 401),
        ]:
            assert await status(cluster, "GET", "/models", **headers) == expected, headers
        assert await status(cluster, "GET", f"/models?key={USER}") == 401


async def test_user_may_not_load_or_unload() -> None:
    async with running_cluster(keys=KEYS) as cluster:
        await cluster.serve_model("tiny#1")
        user, admin = {"x-api-key": USER}, {"x-api-key": ADMIN}
        assert await status(cluster, "POST", "/models/load", **user) == 403
        assert await status(cluster, "DELETE", "/models/tiny", **user) == 403
        assert cluster.supervisor.unloaded == []
        assert await status(cluster, "DELETE", "/models/tiny", **admin) == 200
        assert await status(cluster, "POST", "/generate", **user) == 400  # without a prompt, but let in


@pytest.mark.parametrize("path", ["/models/load", "/hf/models/download", "/something/new"])
def test_what_nobody_thought_of_is_an_admins(path: str) -> None:
    assert access.needed_scope("POST", path) is Scope.ADMIN


def test_where_others_may_connect_addresses_and_listed_names_are_hosts() -> None:
    server = ServerConfig(host="0.0.0.0", allowed_hosts=("llm.example.org",))
    assert access.is_host_allowed("192.168.1.7:8000", server)
    assert access.is_host_allowed("LLM.example.org", server)
    assert not access.is_host_allowed("evil.example", server)
    assert not access.is_host_allowed("192.168.1.7:8000", ServerConfig())


async def test_listed_page_may_call_and_read() -> None:
    config = Config(server=ServerConfig(allowed_origins=(PAGE,)))
    async with running_cluster(config, KEYS) as cluster:
        await cluster.serve_model("tiny#1")
        preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        async with cluster.http.options("/generate", headers=preflight) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, PAGE)
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        async with cluster.http.get("/models", headers={"Origin": PAGE, "x-api-key": USER}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
        foreign = preflight | {"Origin": "https://evil.example"}
        async with cluster.http.options("/generate", headers=foreign) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
