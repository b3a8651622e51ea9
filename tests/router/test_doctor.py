"""Each check of the machine, well and unwell, with what it advises."""

import json
import resource
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from common import openblas
from common.mlx_facts import MachineFacts, ask_worker
from router import doctor
from router.cli.main import main
from router.doctor import Level

CPU = MachineFacts("cpu", "cpu, OpenBLAS 0.3 with 2 threads", True, True, "0.32", "0.32", 0)
BROKEN = "MLX cannot be used: killed by SIGILL"


def levels(facts: MachineFacts | str) -> dict[str, Level]:
    return {check.name: check.level for check in doctor.check_mlx(facts)}


def test_mlx_that_works_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert levels(CPU) == {"mlx": "ok", "blas": "ok", "compiler": "ok"}
    assert levels(msgspec.structs.replace(CPU, backend="metal", description="metal, M4")) == {"mlx": "ok"}


def test_each_lack_of_mlx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert levels("no module mlx") == {"mlx": "fail"}
    assert levels(msgspec.structs.replace(CPU, computes=False))["mlx"] == "fail"
    assert levels(msgspec.structs.replace(CPU, description="cpu, the wheel's reference BLAS"))["blas"] == "warn"
    assert levels(msgspec.structs.replace(CPU, can_fuse=False))["compiler"] == "warn"
    monkeypatch.setattr("sys.platform", "darwin")
    assert levels(CPU)["gpu"] == "warn"


def test_openblas_of_another_cpu_is_told_from_mlx_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(env: Mapping[str, str]) -> MachineFacts | str:
        return CPU if env.get("MLXSPEC_BLAS") == "reference" else BROKEN

    monkeypatch.delenv("MLXSPEC_BLAS", raising=False)
    monkeypatch.setattr(openblas, "library", lambda: Path("/lib/libopenblas.so"))
    (check,) = doctor.examine_mlx(ask)
    assert (check.name, check.level) == ("blas", "fail")
    assert "MLXSPEC_BLAS=reference" in check.advice
    assert [check.name for check in doctor.examine_mlx(lambda env: BROKEN)] == ["mlx"]


def test_a_worker_that_breaks_or_babbles_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for script, found in (
        ("kill -ILL $$", "killed by SIGILL"),
        ("echo no such library >&2; exit 1", "no such library"),
        ("echo hello", "something odd"),
        ("exec sleep 20", "did not start within"),
    ):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(python))
        answer = ask_worker(timeout_s=0.5)
        assert isinstance(answer, str)
        assert found in answer


def test_memory_files_and_disk() -> None:
    gib = doctor.GIB
    assert doctor.check_memory(12 * gib, 16 * gib).level == "ok"
    assert "lower supervisor.memory_limit_gb" in doctor.check_memory(15 * gib, 16 * gib).advice
    assert "raise supervisor.memory_limit_gb" in doctor.check_memory(2 * gib, 16 * gib).advice
    assert doctor.check_files(256, resource.RLIM_INFINITY).level == "ok"
    assert doctor.check_files(256, 1024).level == "warn"
    assert "B free at" in doctor.check_disk(Path("/no/such/folder")).found


def test_home_must_be_writable_and_short(tmp_path: Path) -> None:
    assert doctor.check_home(tmp_path / "new").level == "ok"
    long = doctor.check_home(tmp_path / ("x" * 100))
    assert (long.level, "shorter folder" in long.advice) == ("fail", True)
    (tmp_path / "file").write_text("")
    assert doctor.check_home(tmp_path / "file" / "below").level == "fail"


def test_port_of_another_program_is_named_and_ours_is_well() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = doctor.check_port("127.0.0.1", port, owner=None)
        assert (taken.level, "--port" in taken.advice) == ("fail", True)
        assert doctor.check_port("127.0.0.1", port, owner=1).level == "ok"
    assert doctor.check_port("127.0.0.1", port, owner=None).level == "ok"


def test_service_that_is_installed_should_run() -> None:
    for installed, running, level in ((False, False, "ok"), (True, True, "ok"), (True, False, "warn")):
        assert doctor.check_service({"is_installed": installed, "is_running": running}, "/unit").level == level


def test_running_server_is_one_whose_process_lives(tmp_path: Path) -> None:
    assert doctor.running_server(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    for text, pid in (("", None), ("999999999", None), ("1", 1)):
        (tmp_path / "supervisor.lock").write_text(text)
        assert doctor.running_server(tmp_path) == pid


@pytest.mark.parametrize("is_fit", [True, False])
def test_exit_code_and_json_say_whether_the_machine_is_fit(
    is_fit: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "examine_mlx", lambda: list(doctor.check_mlx(CPU if is_fit else BROKEN)))
    monkeypatch.setattr(doctor, "check_port", lambda *_: doctor.Check("port", Level.OK, "free"))
    assert main(["doctor", "--json"]) == (0 if is_fit else 1)
    answer = json.loads(capsys.readouterr().out)
    assert answer["is_fit"] is is_fit
    assert {"config", "home", "disk", "files", "models", "service", "memory", "mlx"} <= {
        check["name"] for check in answer["checks"]
    }
    assert main(["doctor"]) == (0 if is_fit else 1)
    assert ("-> install it anew" in capsys.readouterr().out) is not is_fit


def test_wrong_configuration_is_a_finding_among_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "examine_mlx", list)
    (tmp_path / "config.toml").write_text("[server]\nprot = 1\n")
    assert main(["doctor"]) == 1
    assert "`prot`" in capsys.readouterr().out
