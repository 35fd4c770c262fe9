"""What NVIDIA's driver tells of a GPU: clocks, temperature, power, energy, who else is on it. Needs nvidia-ml-py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tasks.contracts.records import GpuState
from tasks.scoring.gpu_latency import MIB, GpuMonitor

T = TypeVar("T")

SLOWDOWNS = {  # bits of NVML's clock event reasons; an idle GPU (0x1) is no news
    0x2: "clocks set by the application",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "synchronized boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "clocks of the display",
}


@contextmanager
def watch_gpu(bus_id: str | None = None) -> Iterator[GpuMonitor]:
    """The GPU at a PCI bus id, such as 00000000:65:00.0; the only one if none is given.

    Where the driver's library or its Python binding is absent, the monitor says so and knows nothing.
    """
    try:
        import pynvml
    except ImportError:
        yield Unwatched("nvidia-ml-py is not installed.")
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Unwatched(f"NVML does not start: {error}.")
        return
    try:
        yield _open(pynvml, bus_id)
    finally:
        pynvml.nvmlShutdown()


def _open(pynvml: Any, bus_id: str | None) -> GpuMonitor:
    try:
        count = pynvml.nvmlDeviceGetCount()
        if bus_id is None and count != 1:
            return Unwatched(f"there are {count} GPUs, and no bus id says which one is measured.")
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id) if bus_id else pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError as error:
        return Unwatched(f"NVML does not open {bus_id or 'the GPU'}: {error}.")
    return Nvml(pynvml, handle)


class Unwatched:
    """No driver to ask."""

    def __init__(self, missing: str) -> None:
        self.missing = missing

    def state(self) -> None:
        return None

    def joules(self) -> None:
        return None

    def watts(self) -> None:
        return None


class Nvml:
    """One GPU. What it does not support, as virtual GPUs and MIG slices often do not, is None."""

    missing = ""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self._nvml, self._handle = pynvml, handle

    def state(self) -> GpuState:
        nvml, handle = self._nvml, self._handle
        mask = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)  # the plain one needs a twin driver
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        persistence = self._ask(nvml.nvmlDeviceGetPersistenceMode, handle)
        return GpuState(
            name=self._ask(nvml.nvmlDeviceGetName, handle) or "unknown",
            driver=self._ask(nvml.nvmlSystemGetDriverVersion) or "unknown",
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=self.watts(),
            memory_used_mib=None if memory is None else memory.used / MIB,
            persistence=None if persistence is None else bool(persistence),
            slowdowns=None if mask is None else tuple(name for bit, name in SLOWDOWNS.items() if mask & bit),
            processes=None if processes is None else tuple(process.pid for process in processes),
        )

    def joules(self) -> float | None:
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        return None if millijoules is None else millijoules / 1000

    def watts(self) -> float | None:
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage, self._handle)
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, question: Callable[..., T], *arguments: object) -> T | None:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:  # not supported, not permitted, or not in this driver
            return None
