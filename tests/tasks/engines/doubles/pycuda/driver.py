"""A double of PyCUDA's driver module: the GPU's memory is the host's, and work is done as soon as it is enqueued.

`TROUBLE` says what shall fail; `LIVING` counts what was made and not given back; `FREED` is the order of giving back.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from threading import local
from typing import Any

import numpy as np

TROUBLE: set[str] = set()
LIVING: Counter[str] = Counter()
FREED: list[str] = []
TOTAL = 2**30
_thread = local()


class Error(Exception):
    """The base of PyCUDA's errors."""


class LogicError(Error):
    """A call that CUDA refuses."""


def stack() -> list[Context]:
    """Contexts that this thread has pushed."""
    if not hasattr(_thread, "contexts"):
        _thread.contexts = []
    contexts: list[Context] = _thread.contexts
    return contexts


class _Owned:
    kind = ""

    def __init__(self) -> None:
        _need("no currently active context?")
        LIVING[self.kind] += 1

    def _free(self) -> None:
        LIVING[self.kind] -= 1
        FREED.append(self.kind)


class Context:
    def __init__(self) -> None:
        LIVING["context"] += 1

    def push(self) -> None:
        stack().append(self)

    @staticmethod
    def pop() -> None:
        stack().pop()

    def detach(self) -> None:
        assert stack()[-1] is self, "PyCUDA lets go of a current primary context only"
        stack().pop()
        LIVING["context"] -= 1
        FREED.append("context")


class Device:
    def __init__(self, index: int) -> None:
        self._index = index

    @staticmethod
    def count() -> int:
        return 1

    def name(self) -> str:
        return "Double"

    def compute_capability(self) -> tuple[int, int]:
        return 9, 0

    def retain_primary_context(self) -> Context:
        return Context()


class DeviceAllocation(_Owned):
    kind = "device memory"

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.memory = np.zeros(num_bytes, np.uint8)

    def __int__(self) -> int:
        return int(self.memory.ctypes.data)

    def free(self) -> None:
        self._free()


class _HostAllocation(_Owned):
    kind = "host memory"

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.__array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "version": 3, "data": (0, False),
        }  # fmt: skip
        self._memory = (ctypes.c_uint8 * num_bytes)()
        self.__array_interface__["data"] = (ctypes.addressof(self._memory), False)

    def free(self) -> None:
        self._free()


class Stream(_Owned):
    kind = "stream"
    handle = 7

    def __init__(self, flags: int = 0) -> None:
        super().__init__()
        assert flags == 1, "CU_STREAM_NON_BLOCKING"

    def synchronize(self) -> None:
        _need("synchronize")

    def __del__(self) -> None:
        self._free()


class Event(_Owned):
    kind = "event"

    def record(self, stream: Stream) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        _need("synchronize")

    def time_till(self, later: Event) -> float:
        return (later._at - self._at) * 1e3

    def __del__(self) -> None:
        self._free()


def init() -> None:
    if "init" in TROUBLE:
        raise LogicError("cuInit failed: no CUDA-capable device is detected")


def get_driver_version() -> int:
    return 13020


def mem_get_info() -> tuple[int, int]:
    _need("mem_get_info")
    return TOTAL // 2, TOTAL


def mem_alloc(num_bytes: int) -> DeviceAllocation:
    if "memory" in TROUBLE:
        raise LogicError("cuMemAlloc failed: out of memory")
    return DeviceAllocation(num_bytes)


def pagelocked_empty(size: int, dtype: Any) -> np.ndarray:
    return np.asarray(_HostAllocation(size))


def memcpy_htod_async(target: int, source: np.ndarray, stream: Stream) -> None:
    _need("memcpy_htod_async")
    ctypes.memmove(target, source.ctypes.data, source.nbytes)


def memcpy_dtoh_async(target: np.ndarray, source: int, stream: Stream) -> None:
    _need("memcpy_dtoh_async")
    ctypes.memmove(target.ctypes.data, source, target.nbytes)


def _need(doing: str) -> None:
    if not stack():
        raise LogicError(f"{doing} failed: invalid device context")
    if "fault" in TROUBLE:
        raise LogicError(f"{doing} failed: an illegal memory access was encountered")
