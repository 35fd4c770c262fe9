"""ONNX Runtime: on the CPU, and on a GPU by its CUDA and TensorRT providers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as vendor

from tasks.contracts.errors import EngineError
from tasks.engines.base import Engine, TensorInfo
from tasks.engines.hardware import has_vnni

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# It makes INT8 of float weights between DequantizeLinear and QuantizeLinear, one scale for all channels, so layers that
# are kept float would not be; and INT32 of float biases: too coarse beside FP16, and not for TensorRT.
AS_WRITTEN = {"optimization.disable_specified_optimizers": "WeightBiasQuantization"}
GPU_CONFIG = {"session.disable_cpu_ep_fallback": "1"}  # a node that the provider does not take is an error
ERRORS_ONLY = 3  # of the severities 0 to 4
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# The vendor's exceptions have no base of their own; pybind11 turns what C++ throws besides into RuntimeError.
VENDOR_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(vendor).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
)


class OnnxRuntimeEngine(Engine):
    """An ONNX file in ONNX Runtime, by one provider and no other.

    Without `optimise` the graph runs as it was written, operator by operator.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        optimise: bool = True,
        provider: str = CPU,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._provider, self._provider_options = provider, dict(provider_options or {})
        self._level = "ORT_ENABLE_ALL" if optimise else "ORT_DISABLE_ALL"
        self._threads = threads

    @property
    def options(self) -> dict[str, str]:
        return {
            "provider": self._provider,
            "intra_op_num_threads": str(self._threads),
            "inter_op_num_threads": "1",
            "graph_optimization_level": self._level,
            **self._config,
            **self._provider_options,
        }

    @property
    def _config(self) -> dict[str, str]:
        return (cpu_config() if self._provider == CPU else GPU_CONFIG) | AS_WRITTEN

    @staticmethod
    def version() -> str:
        return str(ort.__version__)

    def _open(self) -> None:
        if not self._path.is_file():
            raise EngineError(f"{self._path} is not a file.", remedy="Name an ONNX file that exists.")
        require(self._provider)
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.__members__[self._level]
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        with engine_errors(f"opening {self._path.name}", remedy="Check that the file is a whole ONNX model."):
            self._session = ort.InferenceSession(
                self._path,
                options,
                providers=[(self._provider, self._provider_options)],
            )
        if self._session.get_providers()[0] != self._provider:  # ONNX Runtime replaces one that fails quietly
            raise EngineError(
                f"{self._provider} does not work here; ONNX Runtime took {self._session.get_providers()}.",
                remedy="Install the CUDA, cuDNN and TensorRT libraries that onnxruntime-gpu was built for.",
            )
        self.inputs = tuple(_info(argument) for argument in self._session.get_inputs())
        self.outputs = tuple(_info(argument) for argument in self._session.get_outputs())

    def _close(self) -> None:
        del self._session

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with engine_errors(f"running {self._path.name}"):
            answers = self._session.run(None, dict(feed))
        return {info.name: answer for info, answer in zip(self.outputs, answers, strict=True)}


def cpu_config() -> dict[str, str]:
    """Entries of a session's configuration on the CPU at hand.

    Without VNNI, products of uint8 and int8 saturate in 16 bits unless `x64quantprecision` takes a slower, exact
    kernel. With VNNI all kernels are exact; but ONNX Runtime 1.31 takes a CPU that has AMX besides for one that
    saturates, and would run ResNet50 there at a third of its speed.
    """
    return {
        "session.intra_op.allow_spinning": "1",  # the default: threads wait busily, quick but not idle
        "session.x64quantprecision": "0" if has_vnni() else "1",
    }


def require(provider: str) -> None:
    """Refuse a provider that this ONNX Runtime does not have, which it would replace by the CPU with a warning.

    Raises:
        EngineError: naming those that it has.
    """
    available = ort.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} has no {provider}, only {', '.join(available)}.",
            remedy="On a machine with a GPU install onnxruntime-gpu in place of onnxruntime.",
        )


@contextmanager
def engine_errors(doing: str, *, remedy: str = "") -> Iterator[None]:
    """The vendor's exceptions become ours, chained."""
    try:
        yield
    except VENDOR_ERRORS as error:
        raise EngineError(f"ONNX Runtime failed while {doing}: {error}.", remedy=remedy) from error


def _info(argument: ort.NodeArg) -> TensorInfo:
    if argument.type not in DTYPES:
        raise EngineError(f"{argument.name!r} is {argument.type}; known are {', '.join(DTYPES)}.")
    return TensorInfo(
        name=argument.name,
        dtype=np.dtype(DTYPES[argument.type]),
        shape=tuple(size if isinstance(size, int) else None for size in argument.shape),
    )
