"""Labelled images as the other steps use them: decoded once, split, and given out in batches.

Axes: N image, C channel, H row, W column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.contracts.errors import DataError
from tasks.contracts.records import SPLITS, SplitName
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec
from tasks.data.cache import DecodedImages, Progress, decode_images, disk_errors
from tasks.data.open_source import is_torchvision, open_source
from tasks.data.preprocess import normalise, resolve_preprocess
from tasks.data.sources import Source, some
from tasks.data.splits import Splits, split_images
from tasks.stores.workspace import replacing

Item = TypeVar("Item")
Batch = TypeVar("Batch")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split. A position counts within the split, a row within `pixels_NHWC`."""

    pixels_NHWC: np.ndarray
    rows: np.ndarray
    labels: np.ndarray  # int64, one per position
    preprocess: PreprocessSpec
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, positions: slice | np.ndarray) -> np.ndarray:
        """Resized and cropped pixels, uint8 NHWC: a copy."""
        return np.asarray(self.pixels_NHWC[self.rows[positions]])

    def batches(self, batch_size: int, *, limit: int | None = None) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Model inputs (float32 NCHW) and labels (int64) of the first `limit` images, in order.

        The next batch is made while the caller works on this one.
        """
        count = len(self) if limit is None else min(limit, len(self))

        def batch(positions: slice) -> tuple[np.ndarray, np.ndarray]:
            return normalise(self.pixels(positions), self.preprocess), self.labels[positions]

        return _one_ahead(batch, _slices(count, batch_size))

    def batches_uint8(
        self, batch_size: int, *, order: np.ndarray | None = None
    ) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Pixels (uint8 NHWC) and labels (int64), in the order of the positions in `order`."""
        positions = np.arange(len(self)) if order is None else order

        def batch(part: slice) -> tuple[np.ndarray, np.ndarray]:
            return self.pixels(positions[part]), self.labels[positions[part]]

        return _one_ahead(batch, _slices(len(positions), batch_size))


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """All splits of the data, decoded."""

    images: DecodedImages
    gate: DecodedImages  # the same as `images` unless the gate has a source of its own
    splits: Splits
    preprocess: PreprocessSpec

    def split(self, name: SplitName) -> ImageSet:
        """One of the splits. Train may be empty."""
        decoded, rows = self._home(name), self.splits.rows[name]
        return ImageSet(decoded.pixels_NHWC, rows, decoded.labels[rows], self.preprocess, self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def counts(self) -> dict[SplitName, int]:
        return {name: len(rows) for name, rows in self.splits.rows.items()}

    @property
    def duplicates_dropped(self) -> int:
        return self.splits.duplicates_dropped

    @property
    def height(self) -> int:
        return int(self.images.pixels_NHWC.shape[1])

    @property
    def width(self) -> int:
        return int(self.images.pixels_NHWC.shape[2])

    @property
    def channels(self) -> int:
        return int(self.images.pixels_NHWC.shape[3])

    def calibrating_on(self, rows: np.ndarray) -> PreparedImages:
        """The same with these rows as calibration split; what it had, and they do not, is for training."""
        pool = np.concatenate([self.splits.rows["calibration"], self.splits.rows["train"]])
        train = pool[~np.isin(pool, rows)]
        return replace(
            self, splits=replace(self.splits, rows={**self.splits.rows, "calibration": rows, "train": train})
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: pixels, labels, classes, splits and preprocessing, wherever the files lie."""
        digest = hashlib.sha256(json.dumps([self.class_names, self.preprocess.model_dump(mode="json")]).encode())
        for name in SPLITS:
            home, rows = self._home(name), self.splits.rows[name]
            digest.update(name.encode())
            digest.update(home.digests[rows].tobytes())
            digest.update(home.labels[rows].tobytes())
        return digest.hexdigest()

    def write_members(self, path: Path) -> None:
        """Write Parquet with a line per image: row, path, label, split, pixels (digest).

        Raises:
            StoreError: if `path` cannot be written.
        """
        table = pa.concat_tables([self._members(name) for name in SPLITS])
        with disk_errors(path.parent), replacing(path) as partial, partial.open("wb") as file:
            pq.write_table(table, file)

    def _members(self, name: SplitName) -> pa.Table:
        home, rows = self._home(name), self.splits.rows[name]
        return pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "path": pa.array([home.names[row] for row in rows], pa.string()),
                "label": pa.array(home.labels[rows], pa.int64()),
                "split": pa.array([name] * len(rows), pa.string()),
                "pixels": pa.array([digest.decode() for digest in home.digests[rows].tolist()], pa.string()),
            }
        )

    def _home(self, name: SplitName) -> DecodedImages:
        return self.gate if name == "gate" else self.images


def prepare_images(
    model: ModelSpec, data: DataSpec, seed: int, scratch: Path, progress: Progress | None = None
) -> PreparedImages:
    """All images of `data`, decoded for `model` and split. Where nothing changed, nothing is decoded again.

    Raises:
        SpecError: if nothing says how to preprocess.
        DataError: if the images cannot be used.
        StoreError: if `scratch` cannot be written.
    """
    preprocess = resolve_preprocess(model, data)
    source, gate_source = open_sources(data)
    if model.class_names is not None:
        source = _with_classes(source, model.class_names)
    if gate_source is None:
        images = decode_images(source, preprocess, scratch, progress)
        return PreparedImages(images, images, split_images(images, data, seed), preprocess)
    gate_source = _with_classes(gate_source, source.class_names)
    total = len(source) + len(gate_source)
    images = decode_images(source, preprocess, scratch, part_of(progress, 0, total))
    gate = decode_images(gate_source, preprocess, scratch, part_of(progress, len(source), total))
    if gate.pixels_NHWC.shape[1:] != images.pixels_NHWC.shape[1:]:
        raise DataError(
            f"Images of {source.name} end as {images.pixels_NHWC.shape[1:3]} (height, width), those of "
            f"{gate_source.name} as {gate.pixels_NHWC.shape[1:3]}.",
            remedy="Add data.preprocess.crop, or resize to a height and a width.",
        )
    return PreparedImages(images, gate, split_images(images, data, seed, gate), preprocess)


def open_sources(data: DataSpec, progress: Progress | None = None) -> tuple[Source, Source | None]:
    """The source, and the gate's own: what the spec names, or the test half of a torchvision data set."""
    gate = data.gate_source or (data.source if is_torchvision(data.source) else None)
    return (
        open_source(data.source, data.root, progress=progress),
        None if gate is None else open_source(gate, data.root, for_gate=True, progress=progress),
    )


def _with_classes(source: Source, class_names: tuple[str, ...]) -> Source:
    """The source with its labels counted in `class_names`, of which it may lack some."""
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown:
        raise DataError(
            f"{source.name} has classes that are not the model's: {some(unknown)}.",
            remedy="Leave them out, or name them in model.class_names (by default the classes of data.source).",
        )
    index_of = np.array([class_names.index(name) for name in source.class_names])
    return replace(source, class_names=class_names, labels=index_of[source.labels])


def part_of(progress: Progress | None, offset: int, total: int) -> Progress | None:
    """Progress of one of several pieces of work, as that of the whole."""
    return None if progress is None else lambda done, _: progress(offset + done, total)


def _slices(count: int, size: int) -> Sequence[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _one_ahead(make: Callable[[Item], Batch], items: Sequence[Item]) -> Generator[Batch]:
    """`make(item)` for each item in order; while the caller works on one, a thread makes the next and no more."""
    with ThreadPoolExecutor(1) as pool:
        jobs = (pool.submit(make, item) for item in items)
        upcoming = next(jobs, None)
        while upcoming is not None:
            ready = upcoming.result()
            upcoming = next(jobs, None)  # submitted now, before the caller gets the batch that is ready
            yield ready
