"""What a report tells of engines on a GPU: their speed, and which precision each layer runs in."""

from __future__ import annotations

from collections import Counter, defaultdict

from tasks.contracts.records import EngineLayer, GpuSpeed, GpuState, GpuTiming, Latency, LayerPrecision, PrecisionAudit
from tasks.report.content import RunReport, milliseconds, number

PRECISIONS: dict[LayerPrecision, str] = {"int8": "INT8", "float16": "FP16", "float32": "FP32", "unknown": "unknown"}
LONGEST_NAME = 90


def baseline_text(latency: Latency) -> str:
    """What the speedup is over, where it is not the model as it came in."""
    return "" if latency.baseline == "float32" else f"over {PRECISIONS[latency.baseline]}"


def timing_text(report: RunReport) -> str:
    """How latency was measured."""
    runtime = f"{report.engine.runtime} {report.engine.version}"
    if report.gpu and report.gpu.timings:
        return (
            f"{runtime} on {report.hardware}. The engines took turns; latency is measured "
            f"{mode_of(report.gpu.timings[0])}. Speedup is over the faster of the float engines, by medians; quartiles "
            "are of neighbouring turns."
        )
    threads = report.spec.target.threads
    return (
        f"{runtime}, {threads} {'thread' if threads == 1 else 'threads'}, on {report.hardware}. Float and INT8 took "
        f"turns for {report.latencies[0].rounds} rounds; the speedup is the ratio of medians, quartiles are of "
        "neighbouring turns."
    )


def memory_name(report: RunReport) -> str:
    """Which memory was measured."""
    return "device memory" if report.spec.target.needs_gpu else "peak memory"


def memory_text(report: RunReport) -> str:
    """How memory was measured, and what it came to."""
    how = (
        "Memory is what an open engine takes of the GPU's"
        if report.spec.target.needs_gpu
        else "Memory is the peak of a fresh process that loads the model and runs one batch"
    )
    return f"{how}: float {number(report.memory.float_mib, 1)} MiB, INT8 {number(report.memory.int8_mib, 1)} MiB."


def mode_of(timing: GpuTiming) -> str:
    """How an inference was run, in words."""
    return f"{'with' if timing.transfers else 'without'} transfers, {'as a CUDA graph' if timing.graph else 'no graph'}"


def gpu_rows(gpu: GpuSpeed) -> tuple[GpuTiming, ...]:
    """Side by side what is to be compared: one batch size, one mode, all precisions."""
    order = list(PRECISIONS)
    return tuple(
        sorted(gpu.timings, key=lambda row: (row.batch_size, not row.transfers, row.graph, order.index(row.precision)))
    )


def gpu_lines(gpu: GpuSpeed) -> tuple[str, ...]:
    """For a terminal: median latency of all precisions, one line for each batch size and mode."""
    lines: dict[tuple[int, str], list[str]] = defaultdict(list)
    for row in gpu_rows(gpu):
        lines[row.batch_size, mode_of(row)].append(f"{PRECISIONS[row.precision]} {milliseconds(row.latency.median)} ms")
    return tuple(f"batch {size}, {mode}: {', '.join(medians)}" for (size, mode), medians in lines.items())


def gpu_notes(gpu: GpuSpeed) -> tuple[str, ...]:
    """What the GPU was doing, and every warning of a timing."""
    states = ((gpu.before, "Before"), (gpu.after, "After"))
    memory = ", ".join(f"{PRECISIONS[kind]} {number(mib, 1)} MiB" for kind, mib in gpu.memory_mib.items())
    return (
        *(f"{when}: {_state_text(state)}." for state, when in states if state),
        *([f"Device memory of an open engine: {memory}."] if memory else []),
        *gpu.notes,
        *(
            f"Batch {row.batch_size}, {mode_of(row)}, {PRECISIONS[row.precision]}: {note}."
            for row in gpu_rows(gpu)
            for note in row.notes
        ),
    )


def _state_text(state: GpuState) -> str:
    numbers = (
        (state.sm_clock_mhz, "MHz (SM)"),
        (state.memory_clock_mhz, "MHz (memory)"),
        (state.temperature_c, "°C"),
        (state.power_w, "W"),
        (state.memory_used_mib, "MiB used"),
    )
    known = [f"{number(value, 0)} {unit}" for value, unit in numbers if value is not None]
    persistence = {None: [], True: ["persistence mode"], False: ["no persistence mode"]}[state.persistence]
    return ", ".join((state.name, f"driver {state.driver}", *known, *persistence))


def audit_text(report: RunReport, audit: PrecisionAudit) -> str:
    """What the engine computes in, beside what the graph asked for."""
    asked = report.export.compression
    shares = ", ".join(
        f"{number(audit.percent(kind), 1)} % {name}" for kind, name in PRECISIONS.items() if audit.macs.get(kind)
    )
    writing = sum(layer.precision == "int8" and layer.macs > 0 and "float" in layer.writes for layer in audit.layers)
    roles = Counter(layer.role for layer in audit.layers)
    return (
        f"Multiply-accumulates in the engine: {shares or 'none'}; the graph asks for "
        f"{number(100 * asked.int8_macs / max(asked.macs, 1), 1)} % INT8. Layers of the engine: {len(audit.layers)}, "
        f"of which {roles['reformat']} change a format only, {roles['quantize']} a Q or DQ that was not fused, and "
        f"{writing} INT8 with float output. "
        + (f"Not found in the engine, or contradicted: {', '.join(audit.unplaced)}." if audit.unplaced else "")
    ).strip()


def shorten(name: str) -> str:
    """A fused layer is called by all that went into it."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def not_int8(audit: PrecisionAudit) -> tuple[EngineLayer, ...]:
    """Layers that compute in another precision, the costliest first; then copies, then Q and DQ."""
    roles = ("compute", "reformat", "quantize")
    layers = (
        layer
        for layer in audit.layers
        if layer.role != "compute" or (layer.precision != "int8" and layer.kind not in ("Constant", "NoOp"))
    )
    return tuple(sorted(layers, key=lambda layer: (roles.index(layer.role), -layer.macs)))
