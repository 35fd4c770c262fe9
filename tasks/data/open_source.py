"""Where images come from: a folder per class, a manifest, a torchvision data set, or scikit-learn's digits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from tasks.contracts.errors import DataError, SpecError
from tasks.data.sources import ArraySource, FileSource, Source, shown, some
from tasks.stores.mirror import Progress, is_remote, local_file, local_tree

ENDINGS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
TORCHVISION = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST")
DIGITS = "digits"


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


def is_manifest(source: str) -> bool:
    """Whether `source` names a file that lists images, rather than a folder of them."""
    return source.lower().endswith((".csv", ".parquet"))


def _open(source: str, root: Path | None, *, for_gate: bool) -> Source:
    if source == DIGITS:
        return _digits()
    if is_torchvision(source):
        return _torchvision(source, root, train=not for_gate)
    if is_manifest(source):
        return _manifest(Path(source), root)
    return _folder(Path(source))


def _remote(source: str, root: str | Path | None, progress: Progress | None) -> FileSource:
    """Copied from S3. What was measured of it is kept under its own address, as each copy has a folder of its own."""
    if not is_manifest(source):
        opened = _folder(local_tree(source, is_image_of_a_class, progress), source)
        return replace(opened, name=source, origin=source)
    file = local_file(source) if is_remote(source) else Path(source)
    start = str(root) if root is not None else source.rpartition("/")[0]
    if not is_remote(start):
        return replace(_manifest(file, Path(start)), name=source)
    listed = frozenset(_text(file, _table(file), "path"))
    return replace(_manifest(file, local_tree(start, listed.__contains__, progress)), name=source, origin=start)


def is_image_of_a_class(path: str) -> bool:
    """Whether a path below a folder is that of an image in a class's folder or below it."""
    parts = PurePosixPath(path).parts
    return len(parts) > 1 and _is_image(parts[-1]) and not any(map(_is_hidden, parts))


def _folder(folder: Path, origin: str = "") -> FileSource:
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}.",
            remedy="data.source names a folder with one sub-folder per class, a .csv or .parquet manifest, "
            "torchvision:<dataset> or digits.",
        )
    class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    unreadable = [shown(name) for name in class_names if shown(name) != name]
    if unreadable:
        raise DataError(
            f"{folder} has classes whose names are not UTF-8: {some(unreadable)}.", remedy="Rename these folders."
        )
    images = [sorted(_images_in(folder / class_name)) for class_name in class_names]
    if not any(images):
        raise DataError(
            f"{origin or folder} holds no images in {len(class_names)} sub-folders.",
            remedy=f"Give each class a sub-folder with files that end in {', '.join(sorted(ENDINGS))}.",
        )
    if all(name.count("/") > 1 for found in images for name in found):
        raise DataError(
            f"{origin or folder} holds images only in folders below its {len(class_names)} sub-folders: "
            f"{some([found[0] for found in images if found])}.",
            remedy="Name the folder whose own sub-folders are the classes, such as train, or list the images in a "
            "manifest.",
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


def _images_in(folder: Path) -> Iterator[str]:
    """Images in and below a class's folder, links followed, as torchvision's ImageFolder takes them."""
    seen = set()
    for place, folders, files in os.walk(folder, onerror=_refuse_unlisted, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link leads here, perhaps out of here
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))  # whichever way is first stays first
        below = f"{folder.name}{place.removeprefix(str(folder))}"
        yield from (f"{below}/{name}" for name in files if _is_image(name) and not _is_hidden(name))


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(
        f"{shown(error.filename)} cannot be listed: {error.strerror}.", remedy="Mend its rights."
    ) from error


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ENDINGS


def _is_hidden(name: str) -> bool:
    return name.startswith(".")  # such as .ipynb_checkpoints, and the ._* twins that macOS leaves


def _manifest(file: Path, root: Path | None) -> FileSource:
    table = _table(file)
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
    """What a manifest lists, by the columns path and label among others."""
    try:
        if file.suffix.lower() == ".parquet":
            table = pq.read_table(file)
        else:
            as_text = {"path": pa.string(), "label": pa.string()}  # a class may be called NA or 007
            table = csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=as_text))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} cannot be read: {error}.", remedy="data.source names a CSV or Parquet file."
        ) from error
    counts = {column: table.column_names.count(column) for column in ("path", "label")}
    wrong = [f"{count or 'no'} column{'s' * (count > 1)} {column}" for column, count in counts.items() if count != 1]
    if wrong:
        raise DataError(
            f"{file} has {' and '.join(wrong)}; found {some(table.column_names)}.",
            remedy="A manifest has one column path and one column label.",
        )
    return table


def _text(file: Path, table: pa.Table, name: str) -> list[str]:
    """The column as text. A missing or empty value, or anything but text and whole numbers, is refused."""
    column = table[name]
    if pa.types.is_dictionary(column.type):  # as pandas writes a categorical
        column = column.cast(column.type.value_type)
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
    unknown = [path for path in paths if not os.path.isfile(folder / path)]  # noqa: PTH113 - it never raises
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
