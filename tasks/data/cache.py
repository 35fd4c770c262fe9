"""Images decoded once: a memory-mapped array in the scratch folder, named by what it was made from.

<scratch>/images/<key>/pixels.npy    uint8 [N, H, W, C], resized and cropped
<scratch>/images/<key>/digests.npy   digest of each image's pixels before resizing
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL

from tasks.contracts.errors import DataError, StoreError
from tasks.contracts.spec import PreprocessSpec
from tasks.data.parallel import in_parallel
from tasks.data.preprocess import fit_image, num_channels, to_channels
from tasks.data.sources import Source, pixels_digest, some

Progress = Callable[[int, int], None]

DIGEST = np.dtype("S32")


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """A source's images, all of one size. One row per image in every array."""

    pixels_NHWC: np.ndarray
    digests: np.ndarray  # of the decoded pixels, before resizing
    labels: np.ndarray  # int64
    names: Sequence[str]
    class_names: tuple[str, ...]
    geometry: str  # how pixels were resized and cropped, as JSON

    def __len__(self) -> int:
        return len(self.digests)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: pixels, labels, classes and geometry, wherever and in what order the files lie."""
        order = np.lexsort((self.labels, self.digests))
        digest = hashlib.sha256(json.dumps([self.class_names, self.geometry]).encode())
        digest.update(self.digests[order].tobytes())
        digest.update(self.labels[order].tobytes())
        return digest.hexdigest()


def decode_images(
    source: Source, preprocess: PreprocessSpec, scratch: Path, progress: Progress | None = None
) -> DecodedImages:
    """All images of `source`, resized and cropped. They are decoded only if `scratch` does not hold them yet.

    Raises:
        DataError: if files cannot be decoded (all of them are counted), or the images end in different sizes.
        StoreError: if `scratch` cannot be written.
    """
    geometry = geometry_of(preprocess)
    key = hashlib.sha256(
        json.dumps([source.fingerprint(), geometry, PIL.__version__, str(DIGEST)]).encode()
    ).hexdigest()
    final = scratch / "images" / key
    if not final.is_dir():
        with disk_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            with locked(final.with_suffix(".lock")):
                if not final.is_dir():  # another process may have built it while this one waited
                    _build(final, source, preprocess, progress)
    pixels_NHWC, digests = _opened(final)
    return DecodedImages(
        pixels_NHWC=pixels_NHWC,
        digests=digests,
        labels=source.labels,
        names=source.names,
        class_names=source.class_names,
        geometry=geometry,
    )


def geometry_of(preprocess: PreprocessSpec) -> str:
    """What of `preprocess` decides the pixels: all but mean and std, of which only the number of channels counts."""
    shape = preprocess.model_dump(mode="json", exclude={"mean", "std"})
    return json.dumps({**shape, "channels": num_channels(preprocess)}, sort_keys=True)


def _build(final: Path, source: Source, preprocess: PreprocessSpec, progress: Progress | None) -> None:
    unfinished = final.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed: who builds holds the lock
    unfinished.mkdir()
    try:
        with (unfinished / "pixels.npy").open("wb") as file:
            digests = _write_pixels(file, source, preprocess, progress)
            _flush(file)
        with (unfinished / "digests.npy").open("wb") as file:
            np.save(file, np.array(digests, DIGEST))
            _flush(file)
        unfinished.replace(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@dataclass(frozen=True)
class _Decoded:
    name: str
    pixels_HWC: np.ndarray
    digest: bytes


def _write_pixels(file: BinaryIO, source: Source, preprocess: PreprocessSpec, progress: Progress | None) -> list[bytes]:
    """Write all images in the order of their rows; their digests. Only a few chunks are in memory at any time."""
    digests: list[bytes] = []
    faults: list[DataError] = []
    first: _Decoded | None = None
    with closing(in_parallel(partial(_decode, source, preprocess), range(len(source)))) as images:
        for row, image in enumerate(images):
            if isinstance(image, DataError):
                faults.append(image)
            elif not faults:  # after a fault the rest is decoded only to name every fault at once
                if first is None:
                    first = image
                    shape = (len(source), *image.pixels_HWC.shape)
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                if image.pixels_HWC.shape != first.pixels_HWC.shape:
                    raise _two_sizes(source, first, image)
                file.write(image.pixels_HWC.data)
                digests.append(image.digest)
            if progress is not None:
                progress(row + 1, len(source))
    if faults:
        problems = some([fault.problem for fault in faults], separator="; ")
        raise DataError(
            f"{len(faults)} of {len(source)} images of {source.name} cannot be used: {problems}.",
            remedy=faults[0].remedy,
        )
    return digests


def _decode(source: Source, preprocess: PreprocessSpec, rows: Sequence[int]) -> list[_Decoded | DataError]:
    return [_decode_one(source, preprocess, row) for row in rows]


def _decode_one(source: Source, preprocess: PreprocessSpec, row: int) -> _Decoded | DataError:
    """One image, or what is wrong with it, so that the others are still looked at."""
    name = source.names[row]
    try:
        image = to_channels(source.load(row), preprocess)
    except DataError as error:
        return error
    try:
        digest = pixels_digest(np.atleast_3d(np.asarray(image)))  # splits are drawn by it: another would move them all
        return _Decoded(name, fit_image(image, preprocess), digest)
    except DataError as error:
        return DataError(f"{name}: {error.problem}", remedy=error.remedy)


def _two_sizes(source: Source, *images: _Decoded) -> DataError:
    sizes = " but ".join(f"{image.name} {'x'.join(map(str, image.pixels_HWC.shape[1::-1]))}" for image in images)
    return DataError(
        f"Images of {source.name} end in different sizes (width x height): {sizes}.",
        remedy="Add data.preprocess.crop, or resize to a height and a width.",
    )


def _opened(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        return np.load(folder / "pixels.npy", mmap_mode="r"), np.load(folder / "digests.npy")
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} is damaged: {error}.", remedy="Delete this folder; it is built again.") from error


def _flush(file: BinaryIO) -> None:
    """Otherwise a power cut could leave the final name with zeros for pixels."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for other processes and threads that hold `path`. The system frees the lock of a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about writing in `folder` into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}.",
            remedy="Free space there, or set REQUANT_SCRATCH to a writable folder on a larger disk.",
        ) from error
