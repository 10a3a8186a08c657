"""Joules of a call, read from the machine's own counters by zeus (https://ml.energy/zeus), or the reason why there are none.

RAPL counts a whole processor package, NVML a whole GPU: what else runs there is in the number. Power times time would be an estimate, so
nothing of that kind is returned.
"""

import time
from collections.abc import Callable

__all__ = ["measure_energy"]

_WINDOW = "dynamoe-lab"


def measure_energy(function: Callable[[], object], *, seconds: float = 2.0) -> tuple[float | None, str]:
    """Joules of one call of `function`, without arguments, and what they are the joules of.

    It is called once to warm up, then again and again for so many `seconds`: counters move every few milliseconds only.

    Needs the optional extra `energy`, and RAPL files that this user may read or a GPU whose NVML counts energy (Volta or later). A
    script needs the usual `if __name__ == "__main__":`, since zeus starts a process that watches RAPL's counter overflow.

    Returns:
        (joules of all counters together, their names in one line), e.g. (81.3, "RAPL package 0 with DRAM, NVML GPU 0"); or (None, the
        reason in one line), in which case `function` may not have been called.

    Raises:
        What `function` raises; the counters' own failures are reasons.

    Example:
        >>> joules, source = lab.measure_energy(lambda: sum(range(1000)), seconds=0.01)
        >>> joules is None or joules > 0  # None: `source` says why
        True
    """
    try:
        from zeus.monitor import ZeusMonitor
    except ModuleNotFoundError as error:
        missing = "zeus is not installed: pip install 'dynamoe-lab[energy]'"
        return None, missing if error.name in ("zeus", "zeus.monitor") else f"zeus cannot be imported: {_line(error)}"
    except Exception as error:  # another release, or a driver's library that does not load
        return None, f"zeus cannot be imported: {_line(error)}"
    try:
        monitor = ZeusMonitor()
        counted = [index for index in monitor.gpu_indices if monitor.gpus.supports_get_total_energy_consumption(index)]
        if not (counted or monitor.cpu_indices):
            return None, _why_none(monitor)
    except Exception as error:  # a driver's or a library's: nothing of it is ours to correct
        return None, f"zeus cannot read the counters: {_line(error)}"
    function()
    try:
        monitor.begin_window(_WINDOW)
    except Exception as error:
        return None, f"zeus cannot read the counters: {_line(error)}"
    calls, began = 0, time.perf_counter()
    try:
        while not calls or time.perf_counter() - began < seconds:
            function()
            calls += 1
    except BaseException:
        monitor.end_window(_WINDOW, cancel=True)
        raise
    try:
        measured = monitor.end_window(_WINDOW)
    except Exception as error:
        return None, f"zeus cannot read the counters: {_line(error)}"
    cpu, dram = measured.cpu_energy or {}, measured.dram_energy or {}
    gpu = {index: joules for index, joules in measured.gpu_energy.items() if index in counted}
    names = [f"RAPL package {index}{' with DRAM' if index in dram else ''}" for index in cpu] + [f"NVML GPU {index}" for index in gpu]
    values = [*cpu.values(), *dram.values(), *gpu.values()]
    if not values or any(joules <= 0 for joules in (*cpu.values(), *gpu.values())):
        return None, f"a counter did not move during the calls ({', '.join(names) or 'none'}): let them take longer"
    return float(sum(values)) / calls, ", ".join(names)


def _why_none(monitor: object) -> str:
    """Why zeus, which keeps the reason to itself, found no counter."""
    if monitor.gpu_indices:
        return "this machine's GPUs count no energy, and its processor's counter cannot be read"
    try:
        from zeus.device import get_cpus

        get_cpus()
    except Exception as error:
        denied = "Permission" in type(error).__name__ or isinstance(error, PermissionError)
        return f"RAPL may not be read by this user: {_line(error)}" if denied else f"this machine has no energy counter: {_line(error)}"
    return "this machine has no energy counter"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
