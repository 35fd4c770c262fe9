from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tasks.scoring.nvml import watch_gpu

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import json
from tasks.scoring.nvml import watch_gpu
with watch_gpu(%r) as gpu:
    state = gpu.state()
    print(json.dumps([gpu.missing, gpu.joules(), gpu.watts(), state and state.model_dump()]))
"""
# As much of NVIDIA's library as is asked, with the types of its header; what is left out is unknown to this driver.
LIBRARY = r"""
#include <string.h>
typedef void *device;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned pid; unsigned long long used; unsigned instance, part; } process;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = COUNT; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *handle) { *handle = "gpu"; return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, device *handle) {
    *handle = "gpu";
    return strcmp(bus, "00000000:65:00.0") ? 6 : 0;
}
int nvmlDeviceGetName(device handle, char *name, unsigned size) { strcpy(name, "Some GPU"); return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) { strcpy(version, "580.1"); return 0; }
int nvmlDeviceGetClockInfo(device handle, unsigned type, unsigned *mhz) { *mhz = type == 1 ? 1410 : 1215; return 0; }
int nvmlDeviceGetTemperature(device handle, unsigned sensor, unsigned *celsius) { *celsius = 41; return 0; }
int nvmlDeviceGetMemoryInfo(device handle, memory *info) { info->used = 512ull << 20; return 0; }
int nvmlDeviceGetCurrentClocksEventReasons(device handle, unsigned long long *mask) { *mask = 0x45; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(device handle, unsigned *count, process *found) {
    if (!found) { *count = 1; return 7; }
    *count = 1;
    found->pid = 4711;
    return 0;
}
int nvmlDeviceGetPowerUsage(device handle, unsigned *milliwatts) { *milliwatts = 61500; return 0; }
#ifdef COUNTER
int nvmlDeviceGetTotalEnergyConsumption(device handle, unsigned long long *spent) { *spent = 7250; return 0; }
#endif
"""


def ask(environment: Mapping[str, str], bus_id: str | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", ASK % bus_id], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def library(folder: Path, *defines: str) -> dict[str, str]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = folder / "nvml.c"
    source.write_text(LIBRARY)
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", *defines, "-o", target, source], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


def test_without_the_binding_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is optional."""
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with watch_gpu() as gpu:
        assert gpu.missing == "nvidia-ml-py is not installed."
        assert (gpu.state(), gpu.joules(), gpu.watts()) == (None, None, None)


def test_without_a_driver_the_reason_is_told(tmp_path: Path) -> None:
    """A machine without a GPU measures no energy, and says why."""
    pytest.importorskip("pynvml")
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    missing, *rest = ask({"LD_LIBRARY_PATH": str(tmp_path)})
    assert missing.startswith("NVML does not start: ")
    assert rest == [None, None, None]


def test_a_gpu_tells_what_it_knows(tmp_path: Path) -> None:
    """Through the real binding, from a library of our own; the rest is None."""
    pytest.importorskip("pynvml")
    missing, joules, watts, state = ask(library(tmp_path, "-DCOUNT=1", "-DCOUNTER"))
    assert (missing, joules, watts) == ("", 7.25, 61.5)
    assert state == {
        "name": "Some GPU",
        "driver": "580.1",
        "sm_clock_mhz": 1410,
        "memory_clock_mhz": 1215,
        "temperature_c": 41,
        "power_w": 61.5,
        "memory_used_mib": 512.0,
        "persistence": None,
        "slowdowns": ["software power cap", "hardware thermal slowdown"],
        "processes": [4711],
    }


def test_a_gpu_without_an_energy_counter(tmp_path: Path) -> None:
    """Power is still told."""
    pytest.importorskip("pynvml")
    _, joules, watts, _ = ask(library(tmp_path, "-DCOUNT=1"))
    assert (joules, watts) == (None, 61.5)


def test_of_several_gpus_one_must_be_named(tmp_path: Path) -> None:
    """Numbers of another GPU would be worse than none."""
    pytest.importorskip("pynvml")
    environment = library(tmp_path, "-DCOUNT=2", "-DCOUNTER")
    assert ask(environment)[0] == "there are 2 GPUs, and no bus id says which one is measured."
    assert ask(environment, "00000000:65:00.0")[:2] == ["", 7.25]
    assert ask(environment, "00000000:99:00.0")[0].startswith("NVML does not open 00000000:99:00.0: ")
