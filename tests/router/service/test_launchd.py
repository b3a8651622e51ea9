"""The property list: every key by name and type, and the policy that the server depends on."""

import plistlib
from pathlib import Path
from typing import Any

import pytest

from router.service import launchd
from router.service.definition import Service

HOME = Path("/Users/ann/Library/mlx spec & co")
AGENT = Service(("--port", "8123", "--model-path", "/m/<odd>"), HOME)
DAEMON = Service((), HOME, is_system=True, user="ann")

# launchd.plist(5): the keys that we use, with their types.
TYPES: dict[str, type] = {
    "Label": str,
    "ProgramArguments": list,
    "UserName": str,
    "EnvironmentVariables": dict,
    "WorkingDirectory": str,
    "ProcessType": str,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ExitTimeOut": int,
    "SoftResourceLimits": dict,
    "HardResourceLimits": dict,
    "Umask": int,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}


@pytest.fixture(params=[AGENT, DAEMON], ids=["agent", "daemon"])
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = request.param
    return found


@pytest.fixture
def plist(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = plistlib.loads(launchd.content(service).encode())
    return found


def test_every_key_is_one_of_launchds_with_its_type(plist: dict[str, Any]) -> None:
    assert {key: type(value) for key, value in plist.items()} == {key: TYPES[key] for key in plist}


def test_policy_keeps_the_server_fast_alive_and_able_to_drain(plist: dict[str, Any]) -> None:
    assert plist["ProcessType"] == "Interactive"
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
    assert plist["RunAtLoad"] is True
    assert plist["ExitTimeOut"] == 60
    assert plist["SoftResourceLimits"] == plist["HardResourceLimits"] == {"NumberOfFiles": 8192}
    assert plist["Umask"] == 63


def test_paths_are_absolute_and_nothing_daemonizes(service: Service, plist: dict[str, Any]) -> None:
    program, *arguments = plist["ProgramArguments"]
    assert Path(program).is_absolute()
    assert arguments == ["-P", "-m", "router.cli", "serve", *service.options]
    for key in ("WorkingDirectory", "StandardOutPath", "StandardErrorPath"):
        assert Path(plist[key]).is_relative_to(HOME)
    assert plist["EnvironmentVariables"] == {"MLXSPEC_HOME": str(HOME)}


def test_a_daemon_names_its_user_and_an_agent_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launchd.properties(DAEMON)["UserName"] == "ann"
    assert "UserName" not in launchd.properties(AGENT)
    assert launchd.path(DAEMON) == Path("/Library/LaunchDaemons/dev.mlxspec.server.plist")
    assert launchd.path(AGENT) == Path.home() / "Library/LaunchAgents/dev.mlxspec.server.plist"
    monkeypatch.setenv("SUDO_USER", "bob")
    assert launchd.properties(Service((), HOME, is_system=True))["UserName"] == "bob"


def test_commands_name_the_domain() -> None:
    assert launchd.start_commands(DAEMON) == [["launchctl", "bootstrap", "system", str(launchd.path(DAEMON))]]
    (stop,) = launchd.stop_commands(AGENT)
    assert stop[:2] == ["launchctl", "bootout"]
    assert stop[2].startswith("gui/")
    assert launchd.is_running("x = {\n\tstate = running\n}")
    assert not launchd.is_running("x = {\n\tstate = waiting\n}")
