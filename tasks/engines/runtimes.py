"""Which adapter opens an engine for which target, and the machine that it is for."""

from __future__ import annotations

from pathlib import Path

import onnx

from tasks.contracts.spec import Runtime, TargetSpec
from tasks.engines.base import Engine
from tasks.engines.onnxruntime import CPU, CUDA, TENSORRT, OnnxRuntimeEngine, require

PROVIDERS: dict[Runtime, str] = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA, "onnxruntime-tensorrt": TENSORRT}


def open_onnx(path: Path, target: TargetSpec, gpu: int | None) -> Engine:
    """An ONNX file in ONNX Runtime, by the provider of `target.runtime`.

    Args:
        gpu: index of the GPU; None for the CPU.
    """
    options = {} if gpu is None else {"device_id": str(gpu)}
    if target.runtime == "onnxruntime-tensorrt":
        options |= tensorrt_options(path, target)
    return OnnxRuntimeEngine(path, threads=target.threads, provider=PROVIDERS[target.runtime], provider_options=options)


def require_provider(target: TargetSpec) -> None:
    """Refuse a target whose provider is not installed.

    Raises:
        EngineError: naming those that are.
    """
    require(PROVIDERS[target.runtime])


def tensorrt_options(path: Path, target: TargetSpec) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider; without a profile it would build anew for each batch size."""
    wanted = target.tensorrt
    (value,) = onnx.load(path, load_external_data=False).graph.input
    sizes = [size.dim_value for size in value.type.tensor_type.shape.dim[1:]]
    shapes = [f"{value.name}:{'x'.join(map(str, (batch, *sizes)))}" for batch in wanted.batch]
    workspace = {} if wanted.workspace_mib is None else {"trt_max_workspace_size": str(wanted.workspace_mib << 20)}
    return {
        "trt_int8_enable": "1",
        "trt_fp16_enable": str(int(wanted.remainder == "float16")),
        "trt_builder_optimization_level": str(wanted.optimization_level),
        **{f"trt_profile_{which}_shapes": shape for which, shape in zip(("min", "opt", "max"), shapes, strict=True)},
        **workspace,
    }
