"""A plan on the GPU: one execution context on one stream, with page-locked buffers for the largest shapes.

Any thread may call, one at a time: a lock, because a context serves one inference at a time, and a second context would
take its activation memory once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Lock

import numpy as np
import tensorrt as trt

from tasks.contracts.errors import EngineError
from tasks.engines.base import TensorInfo, Timing
from tasks.engines.cuda import Gpu, Lane, cuda_errors, free_mib
from tasks.engines.tensorrt_api import LOG, failed, make_runtime, sizes, tensorrt_errors

DTYPES = {  # of inputs and outputs
    trt.DataType.FLOAT: np.float32,
    trt.DataType.HALF: np.float16,
    trt.DataType.INT8: np.int8,
    trt.DataType.UINT8: np.uint8,
    trt.DataType.INT32: np.int32,
    trt.DataType.INT64: np.int64,
    trt.DataType.BOOL: np.bool_,
}
START, READY, DONE, END = range(4)  # moments on the stream


class Session:
    """A loaded plan, until `close`. If it cannot be made, nothing of it stays on the GPU.

    Args:
        name: what errors call it.
        host_code: whether the plan may bring code for the CPU, as a version-compatible one does.
    """

    def __init__(self, plan: bytes, name: str, *, gpu: int, host_code: bool) -> None:
        self._name, self._gpu, self._lock = name, Gpu(gpu), Lock()
        try:
            with self._at_work("loading"):
                self._lane = Lane()
                self._load(plan, host_code=host_code)
                self.inputs = self._tensors(trt.TensorIOMode.INPUT)
                self.outputs = self._tensors(trt.TensorIOMode.OUTPUT)
                self._allocate()
        except BaseException:
            self.close()
            raise

    def run(self, feed: Mapping[str, np.ndarray], *, graph: bool) -> dict[str, np.ndarray]:
        """All outputs by name, in memory of their own."""
        with self._at_work("running"):
            self._stage(feed)
            self._upload()
            self._launch(graph=graph)
            self._download()
            self._lane.synchronize()
            return {info.name: self._here(info).copy() for info in self.outputs}

    def prepare(self, feed: Mapping[str, np.ndarray]) -> None:
        """Inputs on the GPU, for `enqueue` and `time`."""
        with self._at_work("preparing"):
            self._stage(feed)
            self._upload()
            self._lane.synchronize()

    def enqueue(self, *, graph: bool) -> None:
        """One inference on what was prepared, without waiting for it."""
        with self._at_work("running"):
            self._launch(graph=graph)

    def synchronize(self) -> None:
        with self._at_work("waiting for"):
            self._lane.synchronize()

    def time(self, *, transfers: bool, graph: bool) -> Timing:
        """One inference on what was prepared, with events on the stream around its parts and no waiting between."""
        with self._at_work("timing"):
            if graph:
                self._capture()
            self._lane.mark(START)
            if transfers:
                self._upload()
            self._lane.mark(READY)
            began = time.perf_counter()
            self._launch(graph=graph)
            enqueue_ms = (time.perf_counter() - began) * 1e3
            self._lane.mark(DONE)
            if transfers:
                self._download()
            self._lane.mark(END)
            self._lane.synchronize()
            return Timing(
                h2d_ms=self._lane.passed_ms(START, READY) if transfers else 0.0,
                compute_ms=self._lane.passed_ms(READY, DONE),
                d2h_ms=self._lane.passed_ms(DONE, END) if transfers else 0.0,
                enqueue_ms=enqueue_ms,
            )

    def close(self) -> None:
        """Graph, context, engine, runtime, then buffers and stream, at last the GPU: each before what it needs."""
        with self._at_work("closing"):
            lane: Lane | None = vars(self).pop("_lane", None)
            if lane:
                with suppress(EngineError), cuda_errors("closing"):  # after a fault there is nothing to wait for
                    lane.forget_graph()
                    lane.synchronize()
            for part in ("_context", "_engine", "_runtime"):  # whatever of them there is
                vars(self).pop(part, None)
            if lane:
                lane.close()
        self._gpu.release()

    @contextmanager
    def _at_work(self, doing: str) -> Iterator[None]:
        """The GPU is this thread's alone, and what CUDA and TensorRT refuse is an EngineError."""
        task = f"{doing} {self._name}"
        with self._lock, cuda_errors(task), self._gpu.current(), tensorrt_errors(task):
            yield

    def _load(self, plan: bytes, *, host_code: bool) -> None:
        mark = LOG.mark()
        self._runtime = make_runtime()
        self._runtime.engine_host_code_allowed = host_code
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise failed(f"loading {self._name}", mark)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            free, total = free_mib()
            wanted = self._engine.device_memory_size_v2 // 2**20
            room = f"which needs {wanted} MiB, with {free} of {total} MiB free"
            raise failed(f"making a context for {self._name}, {room}", mark)

    def _tensors(self, mode: trt.TensorIOMode) -> tuple[TensorInfo, ...]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return tuple(self._info(name) for name in names if self._engine.get_tensor_mode(name) == mode)

    def _info(self, name: str) -> TensorInfo:
        kind, place = self._engine.get_tensor_dtype(name), self._engine.get_tensor_location(name)
        if kind not in DTYPES or place != trt.TensorLocation.DEVICE:
            raise EngineError(
                f"{name!r} of {self._name} is {kind.name} in {place.name} memory; "
                f"known are {', '.join(known.name for known in DTYPES)} in DEVICE memory.",
                remedy="Export the model with plain tensors as inputs and outputs.",
            )
        shape = tuple(None if size < 0 else size for size in sizes(self._engine.get_tensor_shape(name)))
        return TensorInfo(name=name, dtype=np.dtype(DTYPES[kind]), shape=shape)

    def _allocate(self) -> None:
        """Buffers for the largest shapes: addresses never change."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._set_shapes({info.name: self._largest(info) for info in self.inputs})
        for info in (*self.inputs, *self.outputs):
            mark = LOG.mark()
            if not self._context.set_tensor_address(info.name, self._lane.allocate(info.name, self._bytes(info))):
                raise failed(f"giving {self._name} its buffer {info.name!r}", mark)

    def _largest(self, info: TensorInfo) -> tuple[int, ...]:
        fixed = tuple(size for size in info.shape if size is not None)
        if len(fixed) == len(info.shape):
            return fixed
        return sizes(self._engine.get_tensor_profile_shape(info.name, 0)[2])  # smallest, tuned, largest

    def _set_shapes(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Tell the context what comes, if it is not what came last."""
        if wanted.items() <= self._shapes.items():
            return
        self._lane.forget_graph()  # it is good only for the shapes that its context had
        self._shapes, mark = {}, LOG.mark()
        for name, shape in wanted.items():
            if not self._context.set_input_shape(name, shape):
                raise failed(f"setting {name!r} of {self._name} to {list(shape)}", mark)
        if unknown := self._context.infer_shapes():
            raise failed(f"inferring shapes of {self._name}; unknown are those of {', '.join(unknown)}", mark)
        shapes = {info.name: sizes(self._context.get_tensor_shape(info.name)) for info in self.outputs}
        if open_ones := [name for name, shape in shapes.items() if any(size < 0 for size in shape)]:
            raise EngineError(
                f"The size of {', '.join(open_ones)} of {self._name} depends on the images.",
                remedy="Export a classifier, whose outputs depend on the batch size alone.",
            )
        self._shapes = wanted | shapes

    def _stage(self, feed: Mapping[str, np.ndarray]) -> None:
        """The feed in page-locked memory, from where the GPU fetches it."""
        self._set_shapes({info.name: feed[info.name].shape for info in self.inputs})
        for info in self.inputs:
            np.copyto(self._here(info), feed[info.name])

    def _here(self, info: TensorInfo) -> np.ndarray:
        return self._lane.host(info.name, self._shapes[info.name], info.dtype)

    def _bytes(self, info: TensorInfo) -> int:
        return math.prod(self._shapes[info.name]) * info.dtype.itemsize

    def _upload(self) -> None:
        for info in self.inputs:
            self._lane.upload(info.name, self._bytes(info))

    def _download(self) -> None:
        for info in self.outputs:
            self._lane.download(info.name, self._bytes(info))

    def _launch(self, *, graph: bool) -> None:
        if graph:
            self._capture()
            self._lane.launch()
        else:
            self._execute()

    def _capture(self) -> None:
        """A graph for the present shapes, if there is none yet.

        A plain run comes first: TensorRT allocates what it needs in it, which it may not do during a capture.
        """
        if not self._lane.has_graph:
            self._execute()
            self._lane.synchronize()
            self._lane.capture(self._execute)

    def _execute(self) -> None:
        mark = LOG.mark()
        if not self._context.execute_async_v3(self._lane.handle):
            raise failed(f"running {self._name}", mark)
