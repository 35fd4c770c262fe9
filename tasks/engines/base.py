"""One small interface for all runtimes: an adapter writes `_open`, `_close`, `_run`; everything else is here, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from tasks.contracts.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or an output of an engine; None is a dimension of any size."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype.name}[{sizes}]"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One inference on the GPU's own clock, in milliseconds; copies that were not made took 0."""

    h2d_ms: float  # inputs to the GPU
    compute_ms: float
    d2h_ms: float  # outputs back
    enqueue_ms: float  # on the host's clock: how long it took to hand the work over


class Engine(ABC):
    """A compiled model. A context manager: it owns the runtime's memory between enter and exit.

    `inputs` and `outputs` are known once it is open.
    """

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self.inputs = self.outputs = ()

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference: every output by name.

        Raises:
            EngineError: if the engine is not open, the feed does not fit, or the runtime fails.
        """
        self._check(feed)
        return self._run(feed)

    def answer(self, pixels_NCHW: np.ndarray) -> np.ndarray:
        """The logits [N, C] of a classifier, which has one input and one output.

        Raises:
            EngineError: as `run`, and if there is more than one input or output.
        """
        if len(self.inputs) > 1 or len(self.outputs) > 1:
            sizes = f"{len(self.inputs)} inputs and {len(self.outputs)} outputs"
            raise EngineError(f"The model has {sizes}; a classifier has one of each.")
        return next(iter(self.run({info.name: pixels_NCHW for info in self.inputs}).values()))

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        """Refuse a feed that does not fit. An adapter may refuse more."""
        if not self.inputs:
            raise EngineError(f"{type(self).__name__} is not open.", remedy="Use it inside `with`.")
        check_feed(feed, self.inputs)

    @property
    @abstractmethod
    def options(self) -> dict[str, str]:
        """How the runtime was told to load the model; together with the file, all that decides its speed."""

    @staticmethod
    @abstractmethod
    def version() -> str:
        """The runtime's version."""

    @abstractmethod
    def _open(self) -> None:
        """Load the model; set `inputs` and `outputs`."""

    @abstractmethod
    def _close(self) -> None:
        """Give the runtime's memory back."""

    @abstractmethod
    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference with a feed that fits."""


def check_feed(feed: Mapping[str, np.ndarray], inputs: tuple[TensorInfo, ...]) -> None:
    """Names, dtypes and shapes, before a runtime can read memory that is not there.

    Raises:
        EngineError: at the first input that does not fit.
    """
    expected = [info.name for info in inputs]
    if set(feed) != set(expected):
        raise EngineError(f"The feed names {sorted(feed)}; the model's inputs are {sorted(expected)}.")
    for info in inputs:
        array = feed[info.name]
        fits = len(array.shape) == len(info.shape) and all(
            wanted in (None, found) for wanted, found in zip(info.shape, array.shape, strict=True)
        )
        if array.dtype != info.dtype or not fits:
            found = f"{array.dtype.name}{list(array.shape)}"
            raise EngineError(f"Input {info.name!r} is {found}; the model takes {info}.")
