"""The unit: its policy, its quoting, and what systemd itself says of it."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from router.service import systemd
from router.service.definition import Service

HOME = Path("/home/ann/mlxspec")
USER = Service(("--port", "8123"), HOME)
SYSTEM = Service((), HOME, is_system=True, user="ann")


def parsed(service: Service) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(systemd.content(service))
    return parser


@pytest.mark.parametrize("service", [USER, SYSTEM], ids=["user", "system"])
def test_policy_watches_drains_and_never_gives_up(service: Service) -> None:
    unit = parsed(service)
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "3",
        "WatchdogSec": "30",
        "TimeoutStopSec": "60",
        "KillMode": "mixed",
        "UMask": "0077",
        "LimitNOFILE": "8192",
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "Environment": f"MLXSPEC_HOME={HOME}",
    }
    assert {key: unit["Service"][key] for key in expected} == expected
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


def test_kinds_differ_in_user_target_and_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "User" not in parsed(USER)["Service"]
    assert parsed(SYSTEM)["Service"]["User"] == "ann"
    assert parsed(USER)["Install"]["WantedBy"] == "default.target"
    assert parsed(SYSTEM)["Install"]["WantedBy"] == "multi-user.target"
    assert systemd.path(USER) == tmp_path / "systemd/user/mlxspec.service"
    assert systemd.path(SYSTEM) == Path("/etc/systemd/system/mlxspec.service")


def test_odd_words_mean_themselves() -> None:
    service = Service(("--model-path", '/a b/100%/$HOME/"q"\\'), HOME)
    assert parsed(service)["Service"]["ExecStart"].endswith('--model-path "/a b/100%%/$$HOME/\\"q\\"\\\\"')


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("options", [(), ("--model-path", "/a b/100%/$HOME")], ids=["plain", "odd"])
def test_systemd_accepts_the_unit(tmp_path: Path, options: tuple[str, ...]) -> None:
    home = tmp_path / "a b%"
    home.mkdir()
    unit = tmp_path / systemd.UNIT
    unit.write_text(systemd.content(Service(options, home, is_system=True, user="root")))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if systemd.UNIT in line]
    assert complaints == []
