from __future__ import annotations

from tasks.contracts.records import PrecisionAudit
from tasks.release_engine import released_engines
from tasks.report.content import RunReport
from tasks.report.gpu import audit_text, gpu_lines, gpu_notes, gpu_rows, memory_text, not_int8, shorten, timing_text


def test_what_is_compared_stands_side_by_side(on_gpu: RunReport) -> None:
    """One batch size and mode after the other, INT8 first; whatever the order of measuring."""
    assert on_gpu.gpu
    shuffled = on_gpu.gpu.model_copy(update={"timings": on_gpu.gpu.timings[::-1]})
    rows = gpu_rows(shuffled)
    assert [row.precision for row in rows[:3]] == ["int8", "float16", "float32"]
    assert [(row.batch_size, row.transfers, row.graph) for row in rows[::3]] == [
        (batch, transfers, graph) for batch in (1, 8, 32) for transfers in (True, False) for graph in (False, True)
    ]
    assert gpu_lines(shuffled)[0] == "batch 1, with transfers, no graph: INT8 0.349 ms, FP16 0.340 ms, FP32 0.682 ms"
    assert len(gpu_lines(shuffled)) == 12


def test_what_the_driver_does_not_tell_is_left_out(on_gpu: RunReport) -> None:
    """Nothing is said of an unknown clock; what is known keeps its unit."""
    assert on_gpu.gpu
    assert on_gpu.gpu.before
    silent = dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz", "power_w", "memory_used_mib", "persistence"))
    state = on_gpu.gpu.before.model_copy(update=silent)
    notes = gpu_notes(on_gpu.gpu.model_copy(update={"before": state, "after": None, "timings": (), "memory_mib": {}}))
    assert notes == ("Before: NVIDIA A10, driver 580.65.06, 47 °C.", *on_gpu.gpu.notes)


def test_how_latency_and_memory_were_measured(report: RunReport, on_gpu: RunReport) -> None:
    """Threads mean something on a CPU only."""
    assert timing_text(report).startswith("onnxruntime 1.31.1, 1 thread, on AMD EPYC")
    assert "50 rounds" in timing_text(report)
    assert memory_text(report) == (
        "Memory is the peak of a fresh process that loads the model and runs one batch: float 143.2 MiB, INT8 96.7 MiB."
    )
    assert memory_text(on_gpu) == "Memory is what an open engine takes of the GPU's: float 143.2 MiB, INT8 96.7 MiB."
    assert timing_text(on_gpu).startswith("tensorrt 10.13.3 on NVIDIA A10. The engines took turns")


def test_the_audit_counts_what_slows_int8_down(on_gpu: RunReport) -> None:
    """Format changes, Q and DQ left over, and INT8 layers that write float."""
    audit = on_gpu.engine.audit
    assert audit
    int8 = next(layer for layer in audit.layers if layer.precision == "int8")
    leaky = audit.model_copy(update={"layers": (int8.model_copy(update={"writes": "float16"}), *audit.layers)})
    assert "Layers of the engine: 55, of which 2 change a format only, 1 a Q or DQ" in audit_text(on_gpu, leaky)
    assert "and 1 INT8 with float output." in audit_text(on_gpu, leaky)
    nothing = audit_text(on_gpu, PrecisionAudit(layers=(), macs={"int8": 0}, unplaced=()))
    assert nothing.startswith("Multiply-accumulates in the engine: none; ")
    assert not nothing.endswith(" ")


def test_the_costliest_float_layer_comes_first(on_gpu: RunReport) -> None:
    """Then copies, then Q and DQ; constants compute nothing."""
    audit = on_gpu.engine.audit
    assert audit
    constant = audit.layers[1].model_copy(update={"kind": "Constant", "macs": 0})
    layers = not_int8(audit.model_copy(update={"layers": (constant, *audit.layers)}))
    assert [(layer.role, layer.precision) for layer in layers] == [
        ("compute", "float16"),
        ("compute", "float32"),
        ("compute", "float16"),
        ("reformat", "float16"),
        ("reformat", "float16"),
        ("quantize", "float32"),
    ]
    assert layers[0].macs > layers[1].macs > layers[2].macs == 0


def test_short_names_stay_whole() -> None:
    """Only what would break a table is cut."""
    assert shorten("conv1 + relu") == "conv1 + relu"
    assert len(shorten("x" * 1000)) == 91


def test_a_release_leaves_the_audit_to_the_record(on_gpu: RunReport, report: RunReport) -> None:
    """The same engine is the same release, whoever audited it."""
    (engine,) = released_engines(on_gpu)
    assert engine == on_gpu.engine.model_copy(update={"audit": None})
    assert released_engines(report) == (report.engine,)
