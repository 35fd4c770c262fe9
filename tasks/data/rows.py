"""What is found of some images at once, by a process that does nothing else: so little is imported here."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.contracts.errors import DataError
from tasks.data.measure import Look, look_at, measure
from tasks.data.sources import Source, memory_of, pixels_digest

_FACTS = ("bytes", "sha256", "pixels", "format", "mode", "width", "height", "orientation", "num_frames")

Chunk = tuple[Source, list[str], np.ndarray]  # images, their names as shown, and their states


def measure_rows(chunk: Chunk) -> list[dict[str, list[Any]]]:
    """One table, by columns: what a manifest holds of each image. Of one with a fault it says only that."""
    source, names, states_N2 = chunk
    faults: list[str | None] = []
    facts: list[tuple[Any, ...]] = []
    looks: list[Look] = []
    for row, name in enumerate(names):
        fault = "the name is not UTF-8" if name != source.names[row] else None
        if fault is None:
            try:
                fact, look = _found(source, row)
            except DataError as error:
                fault = error.problem.removeprefix(f"{name}: ")
            else:
                facts.append(fact)
                looks.append(look)
        faults.append(fault)
    columns = {**{name: [fact[k] for fact in facts] for k, name in enumerate(_FACTS)}, **measure(looks)}
    known = dict(zip(("state_size", "state_time"), states_N2.T.tolist(), strict=True))
    return [{"path": names, **known, "fault": faults, **{key: _spread(columns[key], faults) for key in columns}}]


def _found(source: Source, row: int) -> tuple[tuple[Any, ...], Look]:
    found = source.inspect(row)
    pixels_HWC = memory_of(found.image)
    header = (found.format, found.mode, found.width, found.height, found.orientation, found.num_frames)
    facts = (found.num_bytes, found.sha256, pixels_digest(pixels_HWC).decode(), *header)
    return facts, look_at(found.image, pixels_HWC)


def _spread(values: list[Any], faults: list[str | None]) -> list[Any]:
    """The values, in order, where there is no fault; nothing elsewhere."""
    following = iter(values)
    return [next(following) if fault is None else None for fault in faults]
