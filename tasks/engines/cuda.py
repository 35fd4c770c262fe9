"""CUDA by PyCUDA; graphs, which PyCUDA lacks, by cuda-python's driver bindings on the same stream.

Loaded only where a GPU is asked for, inside `vendor_imports`. Both speak the driver's interface, so neither brings a
CUDA runtime of its own that would have to fit the driver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver
from pycuda import driver as cuda

from tasks.contracts.errors import EngineError
from tasks.engines.faults import remedy_for

DRIVER_VERSION = Path("/sys/module/nvidia/version")
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: never waits for the default stream, which PyTorch uses
MIB = 2**20


@contextmanager
def cuda_errors(doing: str) -> Iterator[None]:
    """PyCUDA's exceptions become ours, chained.

    Raises:
        EngineError: with the driver's reason and what helps.
    """
    try:
        yield
    except cuda.Error as error:
        raise EngineError(f"CUDA failed while {doing}: {error}.", remedy=remedy_for(str(error))) from error


class Gpu:
    """A device's primary context, held from here to `release`.

    PyTorch and TensorRT work in the same one, so pointers and streams are good in all three. Threads may share it.
    """

    def __init__(self, index: int) -> None:
        device = _device(index)
        with cuda_errors(f"taking GPU {index}"):
            self._context = device.retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """What this thread works on inside `with`; what was current before is so again afterwards."""
        self._context.push()
        try:
            yield
        finally:
            cuda.Context.pop()

    def release(self) -> None:
        """Give the context back; CUDA ends it when nobody holds it any more.

        PyCUDA 2026.1 lets a primary context go only while it is current, and then leaves it on CUDA's stack, so that
        is popped by hand. After a fault of CUDA there is nothing to give back.
        """
        with suppress(cuda.Error):
            self._context.push()
            driver.cuCtxPopCurrent()
            self._context.detach()


@contextmanager
def on_gpu(index: int) -> Iterator[None]:
    """The GPU that this thread works on inside `with`."""
    gpu = Gpu(index)
    try:
        with gpu.current():
            yield
    finally:
        gpu.release()


def _device(index: int) -> Any:
    with cuda_errors("looking for a GPU"):
        cuda.init()
        count = cuda.Device.count()
        if index >= count:
            raise EngineError(f"There is no GPU {index}; CUDA sees {count}.", remedy="Set REQUANT_GPU to one of them.")
        return cuda.Device(index)


def gpu_facts(index: int) -> dict[str, str]:
    """Name, compute capability and driver. Makes no context, so it takes no GPU memory."""
    device = _device(index)
    major, minor = device.compute_capability()
    version = cuda.get_driver_version()  # 13020 is 13.2
    return {
        "gpu": device.name(),
        "compute_capability": f"{major}.{minor}",
        "driver": DRIVER_VERSION.read_text(encoding="utf-8").strip() if DRIVER_VERSION.exists() else "unknown",
        "cuda_driver": f"{version // 1000}.{version % 1000 // 10}",
    }


def free_mib() -> tuple[int, int]:
    """Free and total memory of the current GPU."""
    free, total = cuda.mem_get_info()
    return free // MIB, total // MIB


def check_free_memory(index: int, least_mib: int) -> None:
    """Refuse to start on a GPU, the current one, that is full.

    Raises:
        EngineError: saying how much is free.
    """
    free, total = free_mib()
    if free < least_mib:
        raise EngineError(
            f"GPU {index} has {free} of {total} MiB free, and {least_mib} are needed.",
            remedy="End other processes on it, take another by REQUANT_GPU, or lower REQUANT_GPU_FREE_MIB.",
        )


class Lane:
    """One stream of the current GPU, with the buffers, events and the CUDA graph that belong to it.

    Each buffer is a piece of page-locked memory here, which the GPU reads and writes by itself, and its twin there.
    """

    def __init__(self) -> None:
        self._stream = cuda.Stream(NON_BLOCKING)
        self._events = [cuda.Event() for _ in range(4)]
        self._here: dict[str, Any] = {}
        self._there: dict[str, Any] = {}
        self._graph: Any = None

    @property
    def handle(self) -> int:
        return int(self._stream.handle)

    @property
    def has_graph(self) -> bool:
        return self._graph is not None

    def allocate(self, name: str, num_bytes: int) -> int:
        """The address of the new buffer on the GPU, aligned to 256 bytes as `cuMemAlloc` does."""
        self._here[name] = cuda.pagelocked_empty(max(num_bytes, 1), np.uint8)
        self._there[name] = cuda.mem_alloc(max(num_bytes, 1))
        return int(self._there[name])

    def host(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The front of a buffer, here, seen as an array."""
        num_bytes = math.prod(shape) * dtype.itemsize
        view: np.ndarray = self._here[name][:num_bytes].view(dtype).reshape(shape)
        return view

    def upload(self, name: str, num_bytes: int) -> None:
        cuda.memcpy_htod_async(int(self._there[name]), self._here[name][:num_bytes], self._stream)

    def download(self, name: str, num_bytes: int) -> None:
        cuda.memcpy_dtoh_async(self._here[name][:num_bytes], int(self._there[name]), self._stream)

    def mark(self, moment: int) -> None:
        self._events[moment].record(self._stream)

    def passed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two moments, after waiting for the second."""
        self._events[end].synchronize()
        return float(self._events[start].time_till(self._events[end]))

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> None:
        """Record what `enqueue` puts on the stream, to be launched as one.

        Thread-local capture: in the global mode an allocation by any other thread, PyTorch's say, would break it.
        """
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _done("beginning a capture", driver.cuStreamBeginCapture(self.handle, mode))
        try:
            enqueue()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(self.handle)  # or the stream could not be used again
            if graph is not None:
                driver.cuGraphDestroy(graph)
            raise
        graph = _done("capturing", driver.cuStreamEndCapture(self.handle))
        try:
            self._graph = _done("making a graph", driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)
        _done("uploading a graph", driver.cuGraphUpload(self._graph, self.handle))

    def launch(self) -> None:
        _done("launching a graph", driver.cuGraphLaunch(self._graph, self.handle))

    def forget_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            try:
                self.synchronize()
            finally:
                driver.cuGraphExecDestroy(graph)

    def close(self) -> None:
        """Give everything back, the stream last. After a fault of CUDA it cannot be: PyCUDA prints that and goes on."""
        for name in list(self._there):
            self._there.pop(name).free()
        for name in list(self._here):
            self._here.pop(name).base.free()
        self._events.clear()
        self._stream = None


def _done(doing: str, result: tuple[Any, ...]) -> Any:
    """What a driver call gave beside its status."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        said = f"{status.name}: {driver.cuGetErrorString(status)[1].decode()}"
        raise EngineError(f"CUDA failed while {doing}: {said}.", remedy=remedy_for(said))
    return values[0] if values else None
