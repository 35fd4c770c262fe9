"""Images decoded once: memory-mapped arrays in the scratch folder, named by what they were made from.

<scratch>/images/<key>/pixels.npy    uint8 [N, H, W, C], resized and cropped
<scratch>/images/<key>/digests.npy   digest of each image's pixels before resizing
<scratch>/images/<key>/lock          held shared by every process that uses them; the folder's time is the last use
<scratch>/images/<key>.lock          held by the process that builds them
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import PIL

from tasks.contracts.errors import DataError, StoreError
from tasks.contracts.settings import Settings
from tasks.contracts.spec import PreprocessSpec
from tasks.data.parallel import in_parallel
from tasks.data.preprocess import fit_image, num_channels, to_channels
from tasks.data.sources import Source, pixels_digest, some

Progress = Callable[[int, int], None]

DIGEST = np.dtype("S32")

_in_use: dict[tuple[int, int], int] = {}  # descriptors of the locks that this process holds; the system closes them


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

    They stay until this process ends, and longer if there is room.

    Raises:
        DataError: if files cannot be decoded (all of them are counted), or the images end in different sizes.
        StoreError: if `scratch` cannot be written.
    """
    geometry = geometry_of(preprocess)
    key = hashlib.sha256(
        json.dumps([source.fingerprint(), geometry, PIL.__version__, str(DIGEST)]).encode()
    ).hexdigest()
    final = scratch / "images" / key
    with disk_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        while not _use(final):
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
            digests = _write_pixels(file, final.parent, source, preprocess, progress)
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


def _write_pixels(
    file: BinaryIO, home: Path, source: Source, preprocess: PreprocessSpec, progress: Progress | None
) -> list[bytes]:
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
                    _make_room(home, math.prod(shape))
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


def _use(folder: Path) -> bool:
    """Keep the folder from being removed while this process lives; False if it is not there."""
    try:
        held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return False
    fcntl.flock(held, fcntl.LOCK_SH)
    state = os.fstat(held)
    try:
        there = os.path.samestat((folder / "lock").stat(), state)
    except FileNotFoundError:
        there = False  # removed while this process waited
    if not there or _in_use.setdefault((state.st_dev, state.st_ino), held) != held:
        os.close(held)
    if there:
        os.utime(folder)
    return there


def _make_room(home: Path, needed_bytes: int) -> None:
    """Remove what killed processes left, and what was used longest ago until so many bytes fit into REQUANT_CACHE_GIB.

    What a process uses stays, and no more is asked for than can be had: images may be larger than any cache.
    """
    with locked(home / "room.lock"):
        for left in home.glob("*.removed"):
            shutil.rmtree(left)
        for unfinished in home.glob("*.partial"):
            with unfinished.with_suffix(".lock").open("w") as file, suppress(BlockingIOError):  # while it is built
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(unfinished, ignore_errors=True)  # or it was finished just now
        folders = [path for path in home.iterdir() if path.is_dir() and not path.suffix]
        folders.sort(key=lambda folder: folder.stat().st_mtime)
        size_of = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in folders}
        excess = sum(size_of.values()) + needed_bytes - Settings().cache_gib * 2**30
        for folder in folders:
            if excess > 0 and _remove(folder):
                excess -= size_of[folder]


def _remove(folder: Path) -> bool:
    """Whether it could be removed. It loses its name first, so that a kill leaves no half of it there."""
    removed = folder.with_name(f"{uuid4().hex}.removed")
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        folder.rename(removed)
    shutil.rmtree(removed)
    return True


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
