"""What an engine runs on: part of an engine's key, and of every latency's meaning."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

INT8_DOT = ("avx512_vnni", "avx_vnni", "asimddp")  # multiply 8-bit values and add them up in 32 bits at once
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
CPUINFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Model of the CPU and those of its instruction sets that INT8 speed depends on."""
    facts = _facts()
    model = facts.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in FLAGS if flag in _flags(facts)]
    return f"{model} ({', '.join(flags) or 'instruction sets unknown'})"


def gpu_hardware(index: int) -> str:
    """Model and compute capability of a GPU, which kernels are chosen for."""
    import torch  # here, as a process that measures an engine's memory must not load it

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


def gpu_bus_id(index: int) -> str:
    """PCI bus id of a GPU, by which NVIDIA's tools know it whatever order CUDA has them in."""
    import torch

    found: Any = torch.cuda.get_device_properties(index)  # torch's types leave these three out
    return f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def has_vnni() -> bool:
    """Whether the CPU has VNNI, or Arm's like of it. False also where the system does not tell."""
    return not _flags(_facts()).isdisjoint(INT8_DOT)


def has_amx() -> bool:
    """Whether the CPU multiplies matrices of 8-bit values by AMX. False also where the system does not tell."""
    return "amx_int8" in _flags(_facts())


def int8_notes() -> tuple[str, ...]:
    """What a reader must know before trusting INT8 numbers from this CPU."""
    if has_vnni():
        return ()
    return (
        "This CPU shows no VNNI instructions: INT8 gains less over float than on a CPU that has them, and may lose. "
        "Judge latency on the target's CPU, and there set session.x64quantprecision to 1 if it has no VNNI either: "
        "ONNX Runtime saturates otherwise, which costs accuracy.",
    )


def _facts() -> dict[str, str]:
    """The first processor's lines in /proc/cpuinfo; nothing on systems without it."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text(encoding="utf-8").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _flags(facts: dict[str, str]) -> set[str]:
    return set(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())
