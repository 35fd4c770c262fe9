"""The engine is written for the CPU that it is built on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from prefect import flow

from tasks.build_engine import build_engine
from tasks.contracts.records import ArtifactRef, EngineRecord
from tasks.contracts.spec import RunSpec, spec_from
from tasks.engines import hardware
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph import amx
from tasks.stores.local import LocalStore
from tests.flows.test_half import up_to_export

if TYPE_CHECKING:
    from tests.flows.conftest import Place


@flow
def up_to_engine(spec: RunSpec) -> tuple[ArtifactRef, EngineRecord]:
    exported = up_to_export(spec)
    return exported.int8_onnx, build_engine(spec, exported)


@pytest.mark.parametrize(("flags", "changed"), [("avx512_vnni amx_int8", 2), ("avx512_vnni", 0)])
def test_weights_are_shifted_where_there_is_amx(
    flags: str, changed: int, place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store keeps as exported stays as it is, and elsewhere it is the engine itself."""
    cpuinfo = place.path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: Some Server CPU\nflags\t\t: avx2 {flags}\n")
    with monkeypatch.context() as elsewhere, place._entered():
        elsewhere.setattr(hardware, "CPUINFO", cpuinfo)
        elsewhere.setattr(amx, "CHANNELS", 16)  # so that two of the three convolutions are large
        elsewhere.setattr(amx, "SUMMED", 72)
        exported, engine = up_to_engine(spec_from(plain, origin="test"))
    assert engine.engine.size_bytes == exported.size_bytes
    assert ("amx_int8" in engine.hardware) == bool(changed)
    paths = [LocalStore(place.store).local_path(ref) for ref in (exported, engine.engine)]
    assert [shifted(path) for path in paths] == [0, changed]
    images = np.random.default_rng(0).standard_normal((4, 1, 32, 32), np.float32)
    answers = []
    for path in paths:
        with OnnxRuntimeEngine(path, threads=1) as opened:
            answers.append(opened.answer(images))
    before, after = answers
    np.testing.assert_array_equal(after, before)


def shifted(path: Path) -> int:
    """How many weights have zero points of minus one."""
    tensors = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sum(tensor.dtype == np.int8 and tensor.ndim == 1 and bool((tensor == -1).all()) for tensor in tensors)
