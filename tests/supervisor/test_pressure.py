"""The machine's memory as the system tells it."""

from types import SimpleNamespace

import msgspec
import psutil
import pytest

from common import mlx_facts
from common.config import SupervisorConfig
from common.mlx_facts import MachineFacts
from router.supervisor import memory, pressure
from router.supervisor.pressure import Pressure

FACTS = MachineFacts("cuda", "cuda, NVIDIA H100", True, True, "0.32", "0.32", 80)


def meminfo(available: int) -> str:
    return f"MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    {available} kB\n"


def stalls(percent: float) -> str:
    return f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={percent} avg60=0.00 avg300=0.00 total=1\n"


@pytest.mark.parametrize(
    ("info", "stalled", "level"),
    [
        ("", "", Pressure.NORMAL),
        (meminfo(500), "", Pressure.NORMAL),
        (meminfo(500), stalls(1.5), Pressure.NORMAL),
        (meminfo(70), stalls(0), Pressure.SHORT),
        (meminfo(500), stalls(30), Pressure.SHORT),
        (meminfo(70), stalls(30), Pressure.CRITICAL),
        (meminfo(20), "", Pressure.CRITICAL),
    ],
)
def test_linux_levels(info: str, stalled: str, level: Pressure) -> None:
    assert pressure.from_linux(info, stalled) is level


@pytest.mark.parametrize(("number", "level"), [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4)])
def test_macos_levels(number: int, level: int) -> None:
    assert pressure.from_level(number) == level


def test_this_machine_tells_a_level() -> None:
    assert pressure.read() in set(Pressure)


def test_metal_budget_is_the_working_set_less_a_reserve() -> None:
    gib = memory.GIB
    assert memory.metal_budget(36 * gib, 0) == 23 * gib
    assert memory.metal_budget(64 * gib, 0) == 47 * gib
    assert memory.metal_budget(64 * gib, 60 * 1024) == 59 * gib
    assert memory.metal_budget(gib, 512) == gib // 4


def test_cuda_budget_is_the_gpus_memory_and_the_machines_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gib, config = memory.GIB, SupervisorConfig()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(memory, "cuda_bytes", lambda: 80 * gib)
    assert memory.budget(config) == 79 * gib
    assert memory.budget(SupervisorConfig(memory_limit_gb=2)) == 2 * gib
    monkeypatch.setattr(memory, "cuda_bytes", lambda: 0)
    assert memory.budget(config) <= psutil.virtual_memory().total * 3 // 4


@pytest.mark.parametrize(
    ("wheels", "answer", "size"),
    [
        (["mlx", "mlx-cuda-13"], FACTS, 80),
        (["mlx", "mlx_cuda_12"], FACTS, 80),
        (["mlx", "mlx-cuda-13"], msgspec.structs.replace(FACTS, backend="cpu"), 0),
        (["mlx", "mlx-cuda-13"], "MLX cannot be used: no driver", 0),
        (["mlx", "mlx-cpu"], FACTS, 0),
    ],
)
def test_gpus_memory_is_asked_for_where_the_cuda_wheel_is(
    wheels: list[str], answer: MachineFacts | str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlx_facts.cuda_bytes.cache_clear()
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [SimpleNamespace(name=name) for name in wheels])
    monkeypatch.setattr(mlx_facts, "ask_worker", lambda: answer)
    assert mlx_facts.cuda_bytes() == size
    mlx_facts.cuda_bytes.cache_clear()


def test_ram_budget_minds_the_container() -> None:
    assert memory.ram_budget(1000) == 750
    assert memory.ram_budget(1000, "max\n") == 750
    assert memory.ram_budget(1000, "400\n") == 300
