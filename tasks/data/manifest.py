"""What a data set consists of: one row per image, measured once and kept, so that nothing is decoded again unchanged.

<scratch>/manifests/<key>/images.parquet   what was measured, of the images as they were then
<scratch>/manifests/<key>/part-*.parquet   the same of a run that was killed; the next one goes on from there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.contracts.errors import DataError
from tasks.data.cache import disk_errors, locked, pixels_digest
from tasks.data.measure import THUMBNAIL, Look, look_at, measure
from tasks.data.parallel import in_parallel, in_processes
from tasks.data.sources import Source
from tasks.stores.workspace import replacing

Progress = Callable[[int, int], None]

PART = 2048  # images that a kill may cost
MANY = 4096  # images from which on processes are worth their start; threads would share one interpreter's lock
CHUNK = 64  # images sent to a process at once
_VERSION = 4  # of `tasks.data.measure`: what another one measured is not used

_NUMBERS = (
    *(f"{statistic}_{channel}" for statistic in ("mean", "std") for channel in "rgb"),
    *("brightness", "entropy", "sharpness", "compressibility", "correlation"),
)
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("state_size", pa.int64()),
        ("state_time", pa.int64()),
        ("fault", pa.string()),  # why it cannot be used; all that follows is null then
        ("bytes", pa.int64()),
        ("sha256", pa.string()),  # of the file
        ("pixels", pa.string()),  # digest of the decoded image: mode, size and pixels
        ("format", pa.string()),
        ("mode", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("orientation", pa.int8()),
        ("num_frames", pa.int32()),
        *((name, pa.float32()) for name in _NUMBERS),
        ("phash", pa.uint64()),
        ("thumbnail", pa.binary(THUMBNAIL**2)),
    ]
)


def build_manifest(source: Source, scratch: Path, progress: Progress | None = None) -> pd.DataFrame:
    """A row per image of `source`, in its order: the columns of SCHEMA and `label` (a class name).

    Raises:
        StoreError: if `scratch` cannot be written.
    """
    key = hashlib.sha256(json.dumps([source.home, str(SCHEMA), PIL.__version__, _VERSION]).encode()).hexdigest()
    folder = scratch / "manifests" / key
    names = [shown(name) for name in source.names]
    with disk_errors(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            known = _known(folder)
            states_N2 = source.states()
            rows = _unknown(known, names, states_N2)
            if len(rows):
                known = pa.concat_tables([known, *_measured(source, names, states_N2, rows, folder, progress)])
                _write(known, folder / "images.parquet")
            for path in folder.glob("part-*.parquet"):
                path.unlink()
    frame: pd.DataFrame = known.to_pandas().drop_duplicates("path", keep="last").set_index("path").loc[names]
    frame["label"] = pd.Categorical([source.class_names[label] for label in source.labels], source.class_names)
    return frame.reset_index()


def shown(name: str) -> str:
    """The name as text: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _known(folder: Path) -> pa.Table:
    paths = [folder / "images.parquet", *sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables([SCHEMA.empty_table(), *(pq.read_table(path) for path in paths if path.exists())])


def _unknown(known: pa.Table, names: list[str], states_N2: np.ndarray) -> np.ndarray:
    """Rows of the images that were not measured as they are now."""
    columns = ["path", "state_size", "state_time"]
    last = known.select(columns).to_pandas().drop_duplicates("path", keep="last").set_index("path")
    found_N2 = last.reindex(names, fill_value=-2).to_numpy(np.int64)
    return np.flatnonzero((found_N2 != states_N2).any(1))


def _measured(
    source: Source,
    names: list[str],
    states_N2: np.ndarray,
    rows: np.ndarray,
    folder: Path,
    progress: Progress | None,
) -> list[pa.Table]:
    def chunk(part: Sequence[int]) -> _Chunk:
        return source.part(part), [names[row] for row in part], states_N2[part]

    wanted = rows.tolist()
    if len(wanted) < MANY:
        measured = in_parallel(lambda part: _rows(chunk(part)), wanted)
    else:
        starts = range(0, len(wanted), CHUNK)
        measured = in_processes(_rows, (chunk(wanted[start : start + CHUNK]) for start in starts))
    parts: list[pa.Table] = []
    first = len(list(folder.glob("part-*.parquet")))
    with closing(measured):
        for number in count(first):
            records = list(islice(measured, PART))
            if not records:
                return parts
            parts.append(pa.Table.from_pylist(records, SCHEMA))
            _write(parts[-1], folder / f"part-{number:06}.parquet")
            if progress is not None:
                progress(sum(map(len, parts)), len(rows))
    return parts


_Chunk = tuple[Source, list[str], np.ndarray]  # with the names as shown, and the states


def _rows(chunk: _Chunk) -> list[dict[str, Any]]:
    source, names, states_N2 = chunk
    found = [_row(source, names, states_N2, row) for row in range(len(source))]
    measured = iter(measure([look for _, look in found if look is not None]))  # many at once cost little
    return [record if look is None else {**record, **next(measured)} for record, look in found]


def _row(source: Source, names: list[str], states_N2: np.ndarray, row: int) -> tuple[dict[str, Any], Look | None]:
    """What a row holds but for what is measured on looks, and the look; none if there is a fault."""
    size, time = states_N2[row].tolist()
    known = {"path": names[row], "state_size": size, "state_time": time}
    if names[row] != source.names[row]:
        return {**known, "fault": "the name is not UTF-8"}, None
    try:
        found = source.inspect(row)
    except DataError as error:
        return {**known, "fault": error.problem.removeprefix(f"{names[row]}: ")}, None
    record = {
        **known,
        "bytes": found.num_bytes,
        "sha256": found.sha256,
        "pixels": pixels_digest(found.image).decode(),
        "format": found.format,
        "mode": found.mode,
        "width": found.width,
        "height": found.height,
        "orientation": found.orientation,
        "num_frames": found.num_frames,
    }
    return record, look_at(found.image)


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished)
