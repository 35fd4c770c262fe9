"""A double of TensorRT's Python API: a plan holds its ONNX, and ONNX Runtime runs it in host memory.

It fails as TensorRT does, by None or False with the reason in the log. What shall fail is named in `TROUBLE`, by the
environment for other processes. `tests/tasks/engines/test_tensorrt_api.py` holds the names to the real API.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from pycuda import driver as cuda
from pycuda import graphs

__version__ = "11.4.0.106"
TROUBLE = set(os.environ.get("TENSORRT_DOUBLE_TROUBLE", "").split())
MAGIC = b"plan:"
sys.modules.setdefault("cuda.bindings.driver", graphs)  # in a process of its own nobody else does it


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool:
        return False

    def phase_finish(self, phase_name: str) -> None: ...


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class ProfilingVerbosity(IntEnum):
    DETAILED = 2


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class BuilderFlag(IntEnum):
    TF32 = 0
    VERSION_COMPATIBLE = 1


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class LayerInformationFormat(IntEnum):
    JSON = 1


class DataType(IntEnum):
    FLOAT = onnx.TensorProto.FLOAT
    HALF = onnx.TensorProto.FLOAT16
    INT8 = onnx.TensorProto.INT8
    UINT8 = onnx.TensorProto.UINT8
    INT32 = onnx.TensorProto.INT32
    INT64 = onnx.TensorProto.INT64
    BOOL = onnx.TensorProto.BOOL


class Dims:
    """A sequence by length and index alone, as the binding's is."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = list(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, axis: int) -> int:
        return self._shape[axis]


class ITensor:
    def __init__(self, info: onnx.ValueInfoProto) -> None:
        self.name = info.name
        kind = info.type.tensor_type
        self.dtype = DataType(kind.elem_type)
        self.shape = Dims([size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim])


class INetworkDefinition:
    model: onnx.ModelProto

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self.model.graph.input[index])


class ParserError:
    def __init__(self, said: str) -> None:
        self._said = said

    def desc(self) -> str:
        return self._said

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "conv1"

    def node_operator(self) -> str:
        return "Conv"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()

    def parse_from_file(self, path: str) -> bool:
        assert isinstance(path, str), "the binding takes no pathlib.Path"
        try:
            self._network.model = onnx.load(path)
            onnx.checker.check_model(self._network.model)
        except Exception as error:
            self._errors.append(ParserError(str(error)))
        if "parse" in TROUBLE:
            self._errors.append(ParserError("Unsupported operator"))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:  # noqa: A002 - TensorRT's names
        self.shapes[input] = [list(shape._shape) for shape in (min, opt, max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class IBuilderConfig:
    builder_optimization_level = 3
    avg_timing_iterations = 1
    profiling_verbosity: ProfilingVerbosity
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    progress_monitor: IProgressMonitor

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.flags, self.pools, self.profiles = {BuilderFlag.TF32}, dict[str, int](), list[IOptimizationProfile]()

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return -1 if "profile" in TROUBLE else 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"other"):
            self._logger.log(ILogger.Severity.WARNING, "timing cache of another GPU")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def _facts(self) -> dict[str, Any]:
        return {
            "level": self.builder_optimization_level,
            "timings": self.avg_timing_iterations,
            "verbosity": self.profiling_verbosity.name,
            "compatibility": self.hardware_compatibility_level.name,
            "flags": sorted(flag.name for flag in self.flags),
            "pools": self.pools,
        }


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        if "crash" in TROUBLE:
            ctypes.string_at(0)
        if "hang" in TROUBLE:
            time.sleep(600)
        config.progress_monitor.phase_start("Building", None, 4)
        for step in range(4):
            if not config.progress_monitor.step_complete("Building", step):
                return None
            time.sleep(0.3 if "slow" in TROUBLE else 0)
        config.progress_monitor.phase_finish("Building")
        if "build" in TROUBLE:
            self._logger.log(ILogger.Severity.ERROR, "Error Code 10: Could not find any implementation for node conv1")
            return None
        profile = config.profiles[0].shapes if config.profiles else {}
        head = json.dumps({"profile": profile, "config": config._facts()}).encode()
        model: bytes = network.model.SerializeToString()
        return MAGIC + head + b"\n" + model


class EngineInspector:
    """Tells data types only if it is given a context whose shapes are set."""

    execution_context: IExecutionContext | None = None

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002 - TensorRT's name
        told = self.execution_context is not None and self.execution_context._has_shapes
        tensor = {"Format/Datatype": "Row major linear FP32" if told else "N/A due to dynamic shapes"}
        layers = [
            {"Name": node.name, "LayerType": node.op_type, "Inputs": [tensor], "Outputs": [tensor]}
            for node in self._engine.model.graph.node
        ]
        return json.dumps({"Layers": layers, **self._engine.facts})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._logger = engine, engine.logger
        self._session = ort.InferenceSession(engine.model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._shapes: dict[str, list[int]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if "shape" in TROUBLE:
            self._logger.log(ILogger.Severity.ERROR, "setInputShape: dimension out of range")
            return False
        self._shapes[name] = list(shape)
        return True

    @property
    def _has_shapes(self) -> bool:
        return bool(self._shapes)

    def infer_shapes(self) -> list[str]:
        if "infer" in TROUBLE:
            raise RuntimeError("inferShapes: a bug")
        return ["pixels"] if "unknown" in TROUBLE else []

    def get_tensor_shape(self, name: str) -> Dims:
        batch = next(iter(self._shapes.values()))[0]
        return Dims([batch if size < 0 else size for size in self._engine.tensors[name].shape._shape])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == cuda.Stream.handle
        if "enqueue" in TROUBLE:
            self._logger.log(ILogger.Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 1")
            return False
        if graphs.pending is None:
            self._work()
        else:
            graphs.pending.append(self._work)
        return True

    def _work(self) -> None:
        feed = {name: self._memory(name, shape).copy() for name, shape in self._shapes.items()}
        names = [output.name for output in self._session.get_outputs()]
        for name, answer in zip(names, self._session.run(names, feed), strict=True):
            self._memory(name, list(answer.shape))[:] = answer

    def _memory(self, name: str, shape: list[int]) -> np.ndarray:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._engine.tensors[name].dtype)
        raw = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
        memory: np.ndarray = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        return memory

    def __del__(self) -> None:
        cuda.FREED.append("execution")


class ICudaEngine:
    device_memory_size_v2 = 3 * 2**20

    def __init__(self, plan: bytes, logger: ILogger) -> None:
        head, content = plan.removeprefix(MAGIC).split(b"\n", 1)
        self.facts, self.logger = json.loads(head), logger
        self.model = onnx.load_from_string(content)
        self._inputs = [ITensor(info) for info in self.model.graph.input]
        self._outputs = [ITensor(info) for info in self.model.graph.output]
        self.tensors = {tensor.name: tensor for tensor in (*self._inputs, *self._outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in {tensor.name for tensor in self._inputs} else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        return self.tensors[name].shape

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if "location" in TROUBLE else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(shape) for shape in self.facts["profile"][name]]

    def create_execution_context(self) -> IExecutionContext | None:
        if "context" in TROUBLE:
            self.logger.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def __del__(self) -> None:
        cuda.FREED.append("engine")


class Runtime:
    engine_host_code_allowed = False

    def __new__(cls, logger: ILogger) -> Self:
        if "runtime" in TROUBLE:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return super().__new__(cls)

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if "deserialize" in TROUBLE:
            self._logger.log(
                ILogger.Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT"
            )
            return None
        return ICudaEngine(serialized_engine, self._logger)

    def __del__(self) -> None:
        cuda.FREED.append("runtime")
