"""Installing, looking and removing, with commands that are only noted."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import NotFound
from router.service import launchd, systemd
from router.service.definition import Service
from router.service.manager import Kind, Manager, Result, ServiceError, run_command


class System:
    """Notes commands; answers with what was set."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.answers: dict[str, Result] = {}

    def __call__(self, command: Sequence[str]) -> Result:
        line = " ".join(command)
        self.commands.append(line)
        return next((answer for part, answer in self.answers.items() if part in line), Result(0, ""))


@pytest.fixture
def system() -> System:
    return System()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Service:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return Service((), tmp_path / "state")


@pytest.mark.parametrize("kind", [launchd, systemd], ids=["launchd", "systemd"])
def test_installed_service_can_be_seen_and_removed(service: Service, system: System, kind: Kind) -> None:
    manager = Manager(service, kind, system)
    assert manager.status().is_installed is False
    manager.install()
    assert manager.path.stat().st_mode & 0o022 == 0
    assert (service.home / "logs").stat().st_mode & 0o777 == 0o700
    system.answers = {"is-active": Result(0, "active"), "print": Result(0, "\tstate = running")}
    status = manager.status()
    assert (status.is_installed, status.is_current, status.is_running) == (True, True, True)
    assert Manager(Service(("--port", "1"), service.home), kind, system).status().is_current is False
    manager.uninstall()
    assert not manager.path.exists()
    with pytest.raises(NotFound, match="no service is installed"):
        manager.uninstall()


def test_systemd_is_told_to_read_enable_and_start(service: Service, system: System) -> None:
    Manager(service, systemd, system).install()
    assert [line.removeprefix("systemctl --user ") for line in system.commands] == [
        "daemon-reload",
        "enable mlxspec.service",
        "restart mlxspec.service",
    ]


def test_launchd_forgets_the_old_service_before_it_gets_the_new(service: Service, system: System) -> None:
    manager = Manager(service, launchd, system)
    manager.install()
    manager.install()
    assert [line.split()[1] for line in system.commands] == ["bootstrap", "bootout", "bootstrap"]


def test_no_start_only_writes(service: Service, system: System) -> None:
    manager = Manager(service, systemd, system)
    manager.install(start=False)
    assert manager.path.exists()
    assert system.commands == []


def test_refusal_says_what_the_system_said_and_what_to_do(service: Service, system: System) -> None:
    system.answers = {"enable": Result(1, "Failed to connect to bus")}
    with pytest.raises(ServiceError, match=r"Failed to connect to bus; the service's file is .*uninstall"):
        Manager(service, systemd, system).install()


def test_unwritable_folder_is_an_error_of_ours(service: Service, system: System, tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("a file where a folder should be")
    with pytest.raises(ServiceError, match="cannot write"):
        Manager(service, systemd, system).install()


def test_missing_tool_is_no_traceback() -> None:
    assert run_command(["/no/such/tool"]).output == "/no/such/tool is not installed"
