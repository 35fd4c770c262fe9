"""Where images come from: a folder per class, a manifest, a torchvision data set, or scikit-learn's digits."""

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
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pyarrow import csv

from tasks.contracts.errors import DataError, SpecError
from tasks.stores.mirror import Progress, is_remote, local_file, local_tree

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
)  # Pillow tries no other decoder, whatever a file says
TORCHVISION = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST")
DIGITS = "digits"
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
    orientation: int  # as EXIF counts: 1 is upright
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
        path = self.root / self.names[row]
        with self._faults(row), Image.open(path, formats=FORMATS) as image:
            return _upright(image)

    def inspect(self, row: int) -> Inspected:
        path = os.path.join(self.root, self.names[row])  # noqa: PTH118 - pathlib takes as long as the system
        with self._faults(row):
            if not self._holds(path):
                raise ValueError(f"leads out of {self.root}")
            with open(path, "rb") as file:  # noqa: PTH123
                content = file.read()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                facts = {
                    "format": str(image.format),
                    "mode": image.mode,
                    "width": image.width,
                    "height": image.height,
                    "orientation": int(image.getexif().get(ExifTags.Base.Orientation, 1)),
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
        return self._digest([str(self.root.resolve()).encode(), *self._states()])

    def _states(self) -> Iterator[bytes]:
        for name in self.names:
            try:
                state = (self.root / name).stat()
            except OSError as error:
                raise _unreadable(name, error.strerror or str(error)) from error
            yield f"\0{name}\0{state.st_size}\0{state.st_mtime_ns}".encode()


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


def open_source(
    source: str, root: str | Path | None = None, *, for_gate: bool = False, progress: Progress | None = None
) -> Source:
    """The images that `source` names (see `DataSpec.source`).

    `root` is what a manifest's paths start from, and where torchvision keeps its data. Only a torchvision data set
    comes in two halves: `for_gate` takes its test half. What lies in S3 is copied first, and `progress` is told.

    Raises:
        StoreError: if S3 cannot be read.
        DataError: if there are no images, or fewer than two classes, or a manifest is unusable.
        SpecError: if torchvision has no such data set.
    """
    if is_remote(source) or is_remote(str(root)):
        opened: Source = _remote(source, root, progress)
    else:
        opened = _open(source, None if root is None else Path(root), for_gate=for_gate)
    if len(opened.class_names) < 2:
        raise DataError(
            f"{source} holds one class only ({opened.class_names[0]}).", remedy="A classifier needs two or more."
        )
    return opened


def is_torchvision(source: str) -> bool:
    """Whether `source` names a torchvision data set."""
    return source.startswith("torchvision:")


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in that mode; the same object if it is already."""
    return image if image.mode == mode else image.convert(mode)


def some(items: Sequence[str], *, separator: str = ", ") -> str:
    """The first few of `items` for a message, and how many more there are."""
    rest = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _open(source: str, root: Path | None, *, for_gate: bool) -> Source:
    if source == DIGITS:
        return _digits()
    if is_torchvision(source):
        return _torchvision(source, root, train=not for_gate)
    if source.endswith((".csv", ".parquet")):
        return _manifest(Path(source), root)
    return _folder(Path(source))


def _remote(source: str, root: str | Path | None, progress: Progress | None) -> FileSource:
    """Copied from S3. What was measured of it is kept under its own address, as each copy has a folder of its own."""
    if not source.endswith((".csv", ".parquet")):
        opened = _folder(local_tree(source, is_image_of_a_class, progress), source)
        return replace(opened, name=source, origin=source)
    file = local_file(source) if is_remote(source) else Path(source)
    start = str(root) if root is not None else source.rpartition("/")[0]
    if not is_remote(start):
        return replace(_manifest(file, Path(start)), name=source)
    listed = frozenset(_text(file, _table(file), "path"))
    return replace(_manifest(file, local_tree(start, listed.__contains__, progress)), name=source, origin=start)


def is_image_of_a_class(path: str) -> bool:
    """Whether a path below a folder is that of an image in a class's own folder."""
    parts = PurePosixPath(path)
    return (
        len(parts.parts) == 2 and parts.suffix.lower() in ENDINGS and not any(map(_is_hidden, map(Path, parts.parts)))
    )


def _folder(folder: Path, shown: str = "") -> FileSource:
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}.",
            remedy="data.source names a folder with one sub-folder per class, a .csv or .parquet manifest, "
            "torchvision:<dataset> or digits.",
        )
    class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry))
    images = [sorted(_images_in(folder / class_name)) for class_name in class_names]
    if not any(images):
        raise DataError(
            f"{shown or folder} holds no images in {len(class_names)} sub-folders.",
            remedy=f"Give each class a sub-folder with files that end in {', '.join(sorted(ENDINGS))}.",
        )
    if not all(images):
        empty = [name for name, found in zip(class_names, images, strict=True) if not found]
        raise DataError(f"{folder} has classes without images: {some(empty)}.", remedy="Fill or remove these folders.")
    return FileSource(
        name=str(folder),
        class_names=tuple(class_names),
        names=[name for found in images for name in found],
        labels=np.repeat(np.arange(len(images)), [len(found) for found in images]),
        root=folder,
    )


def _images_in(folder: Path) -> list[str]:
    return [
        f"{folder.name}/{entry.name}"
        for entry in folder.iterdir()
        if entry.suffix.lower() in ENDINGS and not _is_hidden(entry)
    ]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")  # such as .ipynb_checkpoints, and the ._* twins that macOS leaves


def _manifest(file: Path, root: Path | None) -> FileSource:
    table = _table(file)
    missing = [column for column in ("path", "label") if column not in table.column_names]
    if missing:
        raise DataError(
            f"{file} has no column {' and no column '.join(missing)}; found {some(table.column_names)}.",
            remedy="A manifest has the columns path and label.",
        )
    if table.num_rows == 0:
        raise DataError(f"{file} lists no images.", remedy="Give it one row per image.")
    paths, labels = _text(file, table, "path"), _text(file, table, "label")
    folder = file.parent if root is None else root
    _refuse_strangers(file, folder, paths)
    class_names = _in_order(set(labels))
    label_of = {name: label for label, name in enumerate(class_names)}
    return FileSource(
        name=str(file),
        class_names=tuple(class_names),
        names=paths,
        labels=np.array([label_of[label] for label in labels], np.int64),
        root=folder,
    )


def _table(file: Path) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file)
        as_text = {"path": pa.string(), "label": pa.string()}  # a class may be called NA or 007
        return csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=as_text))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} cannot be read: {error}.", remedy="data.source names a CSV or Parquet file."
        ) from error


def _text(file: Path, table: pa.Table, name: str) -> list[str]:
    """The column as text. A missing or empty value, or anything but text and whole numbers, is refused."""
    column = table[name]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) and not (
        name == "label" and pa.types.is_integer(column.type)
    ):
        raise DataError(
            f"Column {name} of {file} holds {column.type}.",
            remedy="A path is text; a label is text or a whole number.",
        )
    values = column.to_pylist()
    empty = [str(row) for row, value in enumerate(values) if value in (None, "")]
    if empty:
        raise DataError(
            f"Column {name} of {file} is empty in {len(empty)} of {len(values)} rows: {some(empty)} (from 0).",
            remedy="Fill it or leave these rows out.",
        )
    return [str(value) for value in values]


def _refuse_strangers(file: Path, folder: Path, paths: Sequence[str]) -> None:
    outside = [path for path in paths if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts]
    if outside:
        raise DataError(
            f"{file}: {len(outside)} of {len(paths)} paths lead out of {folder}: {some(outside)}.",
            remedy="Paths are relative to data.root (default: the manifest's folder), without `..`.",
        )
    unknown = [path for path in paths if not (folder / path).is_file()]
    if unknown:
        raise DataError(
            f"{file}: {len(unknown)} of {len(paths)} files are not in {folder}: {some(unknown)}.",
            remedy="Mend the paths, or set data.root to the folder that they start from.",
        )


def _in_order(labels: set[str]) -> list[str]:
    """Sorted by value if all of them are numbers, else as text."""
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _digits() -> ArraySource:
    from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

    bundled = load_digits()
    return ArraySource(
        name=DIGITS,
        class_names=tuple(str(name) for name in bundled.target_names),
        names=_indices(len(bundled.images)),
        labels=bundled.target.astype(np.int64),
        pixels=np.rint(bundled.images * (255 / 16)).astype(np.uint8),
    )


def _torchvision(source: str, root: Path | None, *, train: bool) -> ArraySource:
    _, _, name = source.partition(":")
    if name not in TORCHVISION:
        raise SpecError(f"data.source {source} is unknown.", remedy=f"Known sets: {', '.join(TORCHVISION)}.")
    if root is None:
        raise SpecError(
            f"data.source {source} needs data.root.", remedy="Name the folder where torchvision keeps its data."
        )
    import torchvision  # takes seconds to import, and only these sources need it

    try:
        dataset = getattr(torchvision.datasets, name)(root, train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root} does not hold torchvision's {name}: {error}",
            remedy=f"Nothing is downloaded unasked; torchvision.datasets.{name}({str(root)!r}, download=True) does it.",
        ) from error
    return ArraySource(
        name=f"{source} ({'train' if train else 'test'})",
        class_names=tuple(dataset.classes),
        names=_indices(len(dataset)),
        labels=np.asarray(dataset.targets, np.int64),
        pixels=np.asarray(dataset.data),
    )


def _indices(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def pixels_digest(image: Image.Image, content: bytes) -> bytes:
    """XXH3 of an image's mode, size and pixels (`content`), as 32 hexadecimal digits.

    It tells images apart and vouches for nothing: among a thousand million, two are confused with a chance of 1e-21.
    SHA-256 would take a quarter of the time that decoding takes.
    """
    digest = xxhash.xxh3_128(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(content)
    return digest.hexdigest().encode()


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
    return DataError(f"{name}: {reason}", remedy="Mend or remove what cannot be decoded.")
