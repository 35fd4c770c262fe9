"""TensorRT on an NVIDIA GPU. A plan is compared with its key and with this machine before it is loaded.

No vendor is imported before a GPU is asked for, so this module loads anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Machine, PlanKey
from tasks.engines.base import Engine, Timing
from tasks.engines.faults import vendor_imports
from tasks.engines.plan import check_finite, check_machine, check_profile, read_plan

if TYPE_CHECKING:
    from tasks.engines.tensorrt_session import Session


class TensorRtEngine(Engine):
    """A plan on one GPU, in the device's primary context, which PyTorch uses too.

    Threads may share it; they take turns. Several engines may be open in one process. NaN and infinite inputs are
    refused. With `graph`, `run` launches a CUDA graph, captured anew when the shapes change.
    """

    def __init__(self, path: Path, key: PlanKey, *, gpu: int = 0, graph: bool = False) -> None:
        self._path, self._key, self._gpu, self._graph = path, key, gpu, graph
        self._session: Session
        self._prepared: Mapping[str, np.ndarray] | None = None

    @property
    def options(self) -> dict[str, str]:
        return {"cuda_graph": "1" if self._graph else "0", "streams": "1", "host_memory": "page-locked"}

    @staticmethod
    def version() -> str:
        """Raises EngineError where TensorRT is not installed."""
        with vendor_imports():
            from tasks.engines import tensorrt_api
        return tensorrt_api.version()

    def prepare(self, feed: Mapping[str, np.ndarray]) -> None:
        """Check the inputs and put them on the GPU, for `enqueue` and `time`.

        Raises:
            EngineError: as `run`.
        """
        self._check(feed)
        self._prepared = None
        self._session.prepare(feed)
        self._prepared = feed

    def enqueue(self, *, graph: bool) -> None:
        """Start one inference on what was prepared, without waiting and without copies.

        Raises:
            EngineError: if nothing is prepared, or the GPU refuses.
        """
        self._has_prepared()
        self._session.enqueue(graph=graph)

    def synchronize(self) -> None:
        """Wait for all that was started.

        Raises:
            EngineError: if any of it failed.
        """
        self._has_prepared()
        self._session.synchronize()

    def time(self, feed: Mapping[str, np.ndarray], *, transfers: bool, graph: bool) -> Timing:
        """Time one inference on the GPU's clock. One thread at a time measures.

        The same feed object again is taken to be on the GPU already, so that nothing but the inference is between two
        measurements. What happens once, such as the capture of a graph, is not in the time; warming up is the caller's.

        Args:
            transfers: also copy inputs and outputs, between page-locked memory and the GPU.
            graph: launch a CUDA graph in place of single kernels.

        Raises:
            EngineError: as `run`.
        """
        if self._prepared is not feed:
            self.prepare(feed)
        return self._session.time(transfers=transfers, graph=graph)

    def _open(self) -> None:
        plan = read_plan(self._path, self._key)
        check_machine(self._key, this_machine(self._gpu), self._path.name)
        with vendor_imports():
            from tasks.engines.tensorrt_session import Session
        host_code = self._key.version_compatible
        self._session = Session(plan, self._path.name, gpu=self._gpu, host_code=host_code)
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def _close(self) -> None:
        self._prepared = None
        self._session.close()
        del self._session

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        super()._check(feed)
        check_profile(feed, self._key)
        check_finite(feed)

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._prepared = None
        return self._session.run(feed, graph=self._graph)

    def _has_prepared(self) -> None:
        if self._prepared is None:
            raise EngineError(f"Nothing is prepared on {self._path.name}.", remedy="Call prepare first, inside `with`.")


def this_machine(gpu: int = 0) -> Machine:
    """The GPU, its driver and TensorRT: what a plan's key and the timing cache depend on.

    Raises:
        EngineError: if there is no such GPU, or TensorRT or PyCUDA do not load.
    """
    with vendor_imports():
        from tasks.engines import tensorrt_api
    return tensorrt_api.this_machine(gpu)
