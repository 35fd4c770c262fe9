from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tasks.engines import hardware
from tasks.engines.hardware import has_amx, has_vnni, int8_notes

WITH_VNNI = "model name\t: Some Server CPU\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n\nmodel name\t: second\n"
WITHOUT_VNNI = "model name\t: Some Laptop CPU\nflags\t\t: fpu sse2 avx2\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def test_the_cpu_is_named_with_the_instructions_that_int8_needs(cpuinfo: Path) -> None:
    """Only instruction sets that matter are listed, in a fixed order."""
    cpuinfo.write_text(WITH_VNNI)
    assert hardware.hardware() == "Some Server CPU (avx2, avx512f, avx512_vnni)"
    assert has_vnni()
    assert int8_notes() == ()


def test_a_cpu_without_vnni_is_pointed_out(cpuinfo: Path) -> None:
    """The report must warn that such a CPU saturates."""
    cpuinfo.write_text(WITHOUT_VNNI)
    assert not has_vnni()
    assert "saturate" in int8_notes()[0]


def test_amx_is_more_than_vnni(cpuinfo: Path) -> None:
    """Weights are written otherwise for it, so it must not be seen where it is not."""
    cpuinfo.write_text(WITH_VNNI)
    assert not has_amx()
    cpuinfo.write_text(WITH_VNNI.replace("avx512_vnni", "avx512_vnni amx_int8"))
    assert has_amx()


def test_arms_dot_product_counts(cpuinfo: Path) -> None:
    """Arm names no model in this file, and its instructions otherwise."""
    cpuinfo.write_text(ARM)
    assert hardware.hardware().endswith("(asimddp)")
    assert has_vnni()


def test_a_system_that_does_not_tell_is_not_trusted(cpuinfo: Path) -> None:
    """Without the file nothing is claimed beyond what Python knows."""
    assert hardware.hardware() == f"{platform.processor() or platform.machine()} (instruction sets unknown)"
    assert not has_vnni()
