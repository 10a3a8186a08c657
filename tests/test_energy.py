"""Joules come from counters or not at all: a zeus of our own stands for the real one, which finds no counter on most machines."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from dynamoe_lab.evaluation import measure_energy


class Machine:
    """A zeus whose counters move when `work` is called."""

    def __init__(self, monkeypatch, *, cpu=(), dram=(), gpu=(), old_gpu=(), reason: Exception | None = None):
        self.joules = {"cpu": dict.fromkeys(cpu, 0.0), "dram": dict.fromkeys(dram, 0.0), "gpu": dict.fromkeys((*gpu, *old_gpu), 0.0)}
        self.old_gpu, self.reason, self.windows, self.broken = old_gpu, reason, [], False
        zeus, monitor, device = ModuleType("zeus"), ModuleType("zeus.monitor"), ModuleType("zeus.device")
        monitor.ZeusMonitor, device.get_cpus = self.open, self.get_cpus
        for module in (zeus, monitor, device):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def open(self):
        known = SimpleNamespace(supports_get_total_energy_consumption=lambda index: index not in self.old_gpu)
        numbers = {"cpu_indices": list(self.joules["cpu"]), "gpu_indices": list(self.joules["gpu"]), "gpus": known}
        return SimpleNamespace(begin_window=self.begin, end_window=self.end, **numbers)

    def get_cpus(self):
        raise self.reason

    def begin(self, key):
        if self.broken:
            raise RuntimeError("Driver/library\nversion mismatch")
        self.windows.append(key)
        self.before = {kind: dict(values) for kind, values in self.joules.items()}

    def end(self, key, cancel=False):
        self.windows.remove(key)
        moved = {f"{kind}_energy": {i: v - self.before[kind][i] for i, v in values.items()} for kind, values in self.joules.items()}
        return SimpleNamespace(**{name: values if values or name == "gpu_energy" else None for name, values in moved.items()})

    def work(self):
        for kind, joules in (("cpu", 5.0), ("dram", 0.5), ("gpu", 30.0)):
            for index in self.joules[kind]:
                self.joules[kind][index] += joules + index


def test_without_zeus_there_is_a_reason_and_no_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.delitem(sys.modules, "zeus.monitor", raising=False)
    assert measure_energy(lambda: 1 / 0) == (None, "zeus is not installed: pip install 'dynamoe-lab[energy]'")


def test_a_zeus_that_does_not_import(monkeypatch):
    broken = ModuleType("zeus")
    broken.__path__ = []
    monkeypatch.setitem(sys.modules, "zeus", broken)
    monkeypatch.setitem(sys.modules, "zeus.monitor", ModuleType("zeus.monitor"))
    joules, reason = measure_energy(lambda: None)
    assert joules is None
    assert reason.startswith("zeus cannot be imported: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("counters", "joules", "names"),
    [
        ({"cpu": (0,)}, 5.0, "RAPL package 0"),
        ({"cpu": (0, 1), "dram": (0,)}, 5.0 + 6.0 + 0.5, "RAPL package 0 with DRAM, RAPL package 1"),
        ({"gpu": (0, 1)}, 30.0 + 31.0, "NVML GPU 0, NVML GPU 1"),
        ({"cpu": (0,), "gpu": (1,)}, 5.0 + 31.0, "RAPL package 0, NVML GPU 1"),
        ({"cpu": (0,), "old_gpu": (0,)}, 5.0, "RAPL package 0"),  # power samples of old GPUs are no counter
    ],
)
def test_joules_of_all_counters(monkeypatch, counters, joules, names):
    machine = Machine(monkeypatch, **counters)
    machine.work()  # what was used before does not count
    assert measure_energy(machine.work, seconds=0.0) == (pytest.approx(joules), names)
    assert machine.windows == []


def test_no_counter_says_why(monkeypatch):
    class ZeusCPUNoPermissionError(Exception):
        pass

    called = []
    Machine(monkeypatch, reason=ZeusCPUNoPermissionError("RAPL requires\nroot privileges."))
    assert measure_energy(lambda: called.append(1)) == (None, "RAPL may not be read by this user: RAPL requires root privileges.")
    Machine(monkeypatch, reason=RuntimeError("RAPL unavailable"))
    assert measure_energy(lambda: called.append(1)) == (None, "this machine has no energy counter: RAPL unavailable")
    Machine(monkeypatch, old_gpu=(0,))
    assert measure_energy(lambda: called.append(1))[1].startswith("this machine's GPUs count no energy")
    assert not called


def test_a_counter_that_stands_still_is_no_zero(monkeypatch):
    Machine(monkeypatch, cpu=(0,))
    assert measure_energy(lambda: None, seconds=0.01) == (
        None,
        "a counter did not move during the calls (RAPL package 0): let them take longer",
    )


def test_failures_of_the_function_and_of_the_driver(monkeypatch):
    machine = Machine(monkeypatch, cpu=(0,))
    with pytest.raises(ZeroDivisionError):
        measure_energy(lambda: 1 / 0)
    assert machine.windows == [], "the window is closed, so that the next one can open"
    assert measure_energy(machine.work)[0] == 5.0
    machine.broken = True
    assert measure_energy(machine.work) == (None, "zeus cannot read the counters: Driver/library version mismatch")


def test_on_this_machine_as_it_is():
    """A number with its counters, or None with the reason: whatever is installed and whoever runs it."""
    joules, told = measure_energy(lambda: sum(range(10**7)))
    assert told
    assert joules is None or joules > 0


def test_short_calls_are_repeated_and_the_first_is_not_counted(monkeypatch):
    machine, calls = Machine(monkeypatch, cpu=(0,)), []

    def work():
        machine.joules["cpu"][0] += 5.0 if calls else 1_000.0  # the first call allocates, compiles, wakes up
        calls.append(1)
        time.sleep(0.01)

    assert measure_energy(work, seconds=0.05)[0] == pytest.approx(5.0)
    assert 3 <= len(calls) <= 8
