"""A double of cuda-python's driver module: a graph is the list of calls that a capture has recorded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

Graph = list[Callable[[], None]]

CUresult = SimpleNamespace(CUDA_SUCCESS=0)
CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread-local")
LIVING: list[Graph] = []  # executable graphs
CAPTURES: list[int] = []  # calls of each capture that has ended
pending: Graph | None = None  # what a capture under way has recorded


def cuCtxPopCurrent() -> tuple[int, int]:  # noqa: N802 - the names are CUDA's
    return 0, 1


def cuStreamBeginCapture(stream: int, mode: str) -> tuple[int]:  # noqa: N802
    global pending
    assert mode == "thread-local"
    pending = []
    return (0,)


def cuStreamEndCapture(stream: int) -> tuple[int, Graph | None]:  # noqa: N802
    global pending
    graph, pending = pending, None
    CAPTURES.append(len(graph or []))
    return 0, graph


def cuGraphInstantiate(graph: Graph, flags: int) -> tuple[int, Graph]:  # noqa: N802
    LIVING.append(list(graph))
    return 0, LIVING[-1]


def cuGraphUpload(graph: Graph, stream: int) -> tuple[int]:  # noqa: N802
    return (0,)


def cuGraphLaunch(graph: Graph, stream: int) -> tuple[int]:  # noqa: N802
    assert any(graph is living for living in LIVING)
    for call in graph:
        call()
    return (0,)


def cuGraphExecDestroy(graph: Graph) -> tuple[int]:  # noqa: N802
    LIVING[:] = [living for living in LIVING if living is not graph]
    return (0,)


def cuGraphDestroy(graph: Graph) -> tuple[int]:  # noqa: N802
    return (0,)
