"""Labelled images, in files or in memory, decoded one by one. Processes that decode import this and little else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import xxhash
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tasks.contracts.errors import DataError

FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
)  # Pillow tries no other decoder, whatever a file says
SHOWN = 5  # offenders that a message names; it counts the rest

_UNREADABLE = (
    OSError,  # missing, truncated, or no image at all
    RuntimeError,  # a symbolic link to itself, before Python 3.13
    SyntaxError,  # Pillow's word for a broken PNG
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
_GREY = frozenset({"1", "L", "LA", "La"})
_DEEP = frozenset({"I", "F"})  # and I;16 in its byte orders
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBX"}


@dataclass(frozen=True)
class Inspected:
    """A decoded image and what its file says of itself."""

    image: Image.Image  # RGB or L, upright
    num_bytes: int
    sha256: str  # of the file
    format: str
    mode: str  # as stored
    width: int  # as stored
    height: int
    orientation: int  # as EXIF counts: 1 is upright; 0 if the file says none that EXIF knows
    num_frames: int


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """Labelled images that can be loaded one by one, from any thread. `labels` are int64 indices of `class_names`."""

    name: str
    class_names: tuple[str, ...]
    names: Sequence[str]  # one per image: its path below the source, or its index
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, row: int) -> Image.Image:
        """The decoded image, RGB or L.

        Raises:
            DataError: if it cannot be decoded.
        """

    @abstractmethod
    def inspect(self, row: int) -> Inspected:
        """The same image with all that its file tells.

        Raises:
            DataError: if it cannot be decoded, or lies outside the source.
        """

    @abstractmethod
    def states(self) -> np.ndarray:
        """Of each image two numbers that change when it may have changed, int64 [N, 2]; -1 for one that is missing."""

    @property
    @abstractmethod
    def home(self) -> str:
        """What names and states are valid in: facts of an image may be kept under these three."""

    def part(self, rows: Sequence[int]) -> Self:
        """A source of these rows alone, small enough to be sent to another process."""
        return replace(self, names=[self.names[row] for row in rows], labels=self.labels[rows])

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 that changes when an image, a label or a class may have changed. No image is decoded."""

    def _digest(self, contents: Iterable[bytes]) -> str:
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.tobytes())
        for content in contents:
            digest.update(content)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class FileSource(Source):
    """Image files below `root`."""

    root: Path
    origin: str = ""  # where `root` is a copy of, if it is one

    def load(self, row: int) -> Image.Image:
        with self._faults(row):
            content = _content(os.path.join(self.root, self.names[row]))  # noqa: PTH118
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _upright(image)

    def inspect(self, row: int) -> Inspected:
        path = os.path.join(self.root, self.names[row])  # noqa: PTH118 - pathlib takes as long as the system
        with self._faults(row):
            if not self._holds(path):
                raise ValueError(f"leads out of {self.root}")
            content = _content(path)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                facts = {
                    "format": str(image.format),
                    "mode": image.mode,
                    "width": image.width,
                    "height": image.height,
                    "orientation": int(orientation) if orientation in range(1, 9) else 0,
                    "num_frames": int(getattr(image, "n_frames", 1)),
                }
                upright = _upright(image)
            return Inspected(
                image=upright,
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                **facts,  # type: ignore[arg-type]
            )

    def _holds(self, path: str) -> bool:
        """Whether it lies below the root, links followed: a folder's once, as that costs as much as a small image."""
        if os.path.islink(path):  # noqa: PTH114
            return Path(path).resolve().is_relative_to(self._real_root)
        folder = os.path.dirname(path)  # noqa: PTH120
        if folder not in self._folders:
            self._folders[folder] = Path(folder).resolve().is_relative_to(self._real_root)
        return self._folders[folder]

    @cached_property
    def _folders(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _real_root(self) -> Path:
        return self.root.resolve()

    @contextmanager
    def _faults(self, row: int) -> Iterator[None]:
        """Whatever is wrong with a file becomes a DataError that names it."""
        try:
            yield
        except _UNREADABLE as error:
            raise _unreadable(self.names[row], _reason(error, self.root / self.names[row])) from error

    def states(self) -> np.ndarray:
        """Size and time of change."""
        found = np.full((len(self), 2), -1, np.int64)
        for row, name in enumerate(self.names):
            with suppress(OSError):
                state = os.stat(os.path.join(self.root, name))  # noqa: PTH116, PTH118
                found[row] = state.st_size, state.st_mtime_ns
        return found

    @property
    def home(self) -> str:
        return self.origin or str(self._real_root)

    def fingerprint(self) -> str:
        """Trusts size and time of change, as make and rsync do, below one folder."""
        return self._digest([os.fsencode(self.root.resolve()), *self._states()])

    def _states(self) -> Iterator[bytes]:
        for name in self.names:
            try:
                state = (self.root / name).stat()
            except OSError as error:
                raise _unreadable(name, error.strerror or str(error)) from error
            yield os.fsencode(f"\0{name}\0{state.st_size}\0{state.st_mtime_ns}")


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images in memory: uint8, [N, H, W] grey or [N, H, W, 3] colour."""

    pixels: np.ndarray

    def load(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def inspect(self, row: int) -> Inspected:
        image, content = self.load(row), self.pixels[row].tobytes()
        return Inspected(
            image=image,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            format="array",
            mode=image.mode,
            width=image.width,
            height=image.height,
            orientation=1,
            num_frames=1,
        )

    def part(self, rows: Sequence[int]) -> Self:
        return replace(super().part(rows), pixels=self.pixels[rows])

    def states(self) -> np.ndarray:
        return np.zeros((len(self), 2), np.int64)  # `home` says it all

    @property
    def home(self) -> str:
        return self.fingerprint()

    def fingerprint(self) -> str:
        return self._digest([str(self.pixels.shape).encode(), self.pixels.tobytes()])


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in that mode; the same object if it is already."""
    return image if image.mode == mode else image.convert(mode)


def shown(name: str) -> str:
    """The name as text: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def some(items: Sequence[str], *, separator: str = ", ") -> str:
    """The first few of `items` for a message, and how many more there are."""
    rest = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def memory_of(image: Image.Image) -> np.ndarray:
    """What a decoded image, RGB or L, holds in memory: uint8 [H, W, 4], of which the fourth is 255, or [H, W, 1].

    Not copied, as all of Pillow's own ways do, unless it lies in several pieces, as one of more than 16 MiB does.
    """
    try:
        memory = pa.array(image).buffers()[-1]
    except ValueError:
        memory = image.tobytes("raw", "RGBX" if image.mode == "RGB" else image.mode)
    return np.frombuffer(memory, np.uint8).reshape(image.height, image.width, -1)


def pixels_digest(pixels_HWC: np.ndarray) -> bytes:
    """XXH3 of an image's size and pixels, as 32 hexadecimal digits; one with a fourth byte per pixel has another.

    It tells images apart and vouches for nothing: among a thousand million, two are confused with a chance of 1e-21.
    SHA-256 would take a quarter of the time that decoding takes.
    """
    height, width, channels = pixels_HWC.shape
    digest = xxhash.xxh3_128(f"{_CHANNELS[channels]} {width}x{height} ".encode())
    digest.update(pixels_HWC.data)
    return digest.hexdigest().encode()


def _content(path: str) -> bytes:
    """All that a file holds. A pipe holds nothing, and does not keep us waiting for somebody who writes to it."""
    with open(path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        return file.read() or b""


def _upright(image: Image.Image) -> Image.Image:
    """Decoded to the last byte, turned as EXIF says, and RGB or L."""
    _refuse_bomb(image)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _eight_bit(image)


def _refuse_bomb(image: Image.Image) -> None:
    """Pillow only warns below twice this size."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP or image.mode.startswith("I;16"):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel, which would be clipped")
    return in_mode(image, "L" if image.mode in _GREY else "RGB")


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is empty" if path.stat().st_size == 0 else f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _unreadable(name: str, reason: str) -> DataError:
    return DataError(f"{shown(name)}: {reason}", remedy="Mend or remove what cannot be decoded.")
