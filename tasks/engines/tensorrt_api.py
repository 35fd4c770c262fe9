"""What building and running share of TensorRT, which reports failures as None or False and says why in its log only.

Loaded only where TensorRT is asked for, inside `vendor_imports`. One code path serves 10.x and 11.x.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from threading import Lock

import tensorrt as trt

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Machine
from tasks.engines.cuda import gpu_facts
from tasks.engines.faults import remedy_for

KEPT = 200  # messages


class Log(trt.ILogger):
    """Keeps warnings and worse. TensorRT calls it from any of its threads."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lock = Lock()
        self._messages: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._count = 0

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if int(severity) <= int(trt.ILogger.Severity.WARNING):  # 0 is the worst
            with self._lock:
                self._count += 1
                self._messages.append((self._count, f"{severity.name}: {msg}"))

    def mark(self) -> int:
        """Now, for `since`. Nothing is dropped here, as another thread may be about to read it."""
        return self._count

    def since(self, mark: int) -> tuple[str, ...]:
        with self._lock:
            return tuple(text for count, text in self._messages if count > mark)


LOG = Log()  # one for the whole process: TensorRT takes the first that it is given for everything


def failed(doing: str, mark: int, otherwise: str = "") -> EngineError:
    """The error for a None or a False, with all that TensorRT has said since `mark`."""
    said = "; ".join(LOG.since(mark)) or "TensorRT gave no reason"
    return EngineError(f"TensorRT failed while {doing}: {said}.", remedy=remedy_for(said, otherwise))


@contextmanager
def tensorrt_errors(doing: str) -> Iterator[None]:
    """What TensorRT's C++ throws reaches Python as RuntimeError; here it becomes ours, chained."""
    mark = LOG.mark()
    try:
        yield
    except RuntimeError as error:
        raise failed(f"{doing}, by {error}", mark) from error


def make_builder() -> trt.Builder:
    """Raises EngineError without a usable GPU: the binding then raises TypeError, as its factory gave null."""
    mark = LOG.mark()
    try:
        return trt.Builder(LOG)
    except TypeError as error:
        raise failed("starting its builder", mark, NO_GPU) from error


def make_runtime() -> trt.Runtime:
    """Raises EngineError like `make_builder`."""
    mark = LOG.mark()
    try:
        return trt.Runtime(LOG)
    except TypeError as error:
        raise failed("starting its runtime", mark, NO_GPU) from error


NO_GPU = "Check that nvidia-smi shows a GPU, and that the driver is new enough for the CUDA of this TensorRT."


def sizes(shape: trt.Dims) -> tuple[int, ...]:
    """-1 is a dynamic size."""
    return tuple(shape[axis] for axis in range(len(shape)))


def version() -> str:
    return str(trt.__version__)


def this_machine(gpu: int) -> Machine:
    """Raises EngineError if CUDA sees no such GPU."""
    return Machine(
        **gpu_facts(gpu),
        cuda_runtime=_cuda_of_package(),
        tensorrt=version(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def _cuda_of_package() -> str:
    """The wheels say it in their name; TensorRT itself does not tell."""
    for major in ("13", "12"):
        for name in (f"tensorrt-cu{major}-bindings", f"tensorrt-cu{major}"):
            try:
                if distribution(name).version == version():
                    return major
            except PackageNotFoundError:
                continue
    return "unknown"
