"""What a data set consists of: one row per image, measured once and kept, so that nothing is decoded again unchanged.

<scratch>/manifests/<key>/images.parquet   what was measured, of the images as they were then
<scratch>/manifests/<key>/part-*.parquet   the same of a run that was killed; the next one goes on from there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.cache import disk_errors, locked
from tasks.data.measure import THUMBNAIL
from tasks.data.parallel import in_parallel, in_processes
from tasks.data.rows import Chunk, measure_rows
from tasks.data.sources import Source, shown
from tasks.stores.workspace import replacing

Progress = Callable[[int, int], None]

PART = 2048  # images that a kill may cost
MANY = 2048  # images from which on processes are worth their start; threads would share one interpreter's lock
CHUNK = 64  # images sent to a process at once
_VERSION = 8  # of `tasks.data.measure`: what another one measured is not used

_NUMBERS = (
    *(f"{statistic}_{channel}" for statistic in ("mean", "std") for channel in "rgb"),
    *("brightness", "std_luma", "entropy", "sharpness", "compressibility", "correlation"),
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
    def chunk(part: Sequence[int]) -> Chunk:
        return source.part(part), [names[row] for row in part], states_N2[part]

    wanted = rows.tolist()
    if len(wanted) < MANY:
        measured = in_parallel(lambda part: measure_rows(chunk(part)), wanted)
    else:
        starts = range(0, len(wanted), CHUNK)
        measured = in_processes(measure_rows, (chunk(wanted[start : start + CHUNK]) for start in starts))
    parts: list[pa.Table] = []
    first = len(list(folder.glob("part-*.parquet")))
    with closing(measured):
        tables = (pa.Table.from_pydict(columns, SCHEMA) for columns in measured)
        for number in count(first):
            part = list(_about(PART, tables))
            if not part:
                return parts
            parts.append(pa.concat_tables(part))
            _write(parts[-1], folder / f"part-{number:06}.parquet")
            if progress is not None:
                progress(sum(map(len, parts)), len(rows))
    return parts


def _about(num_rows: int, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The next tables, until they have that many rows together."""
    while num_rows > 0 and (table := next(tables, None)) is not None:
        yield table
        num_rows -= len(table)


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished)
