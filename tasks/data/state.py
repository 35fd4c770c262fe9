"""What tells that data may have changed, without decoding an image or fetching an object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tasks.contracts.spec import DataSpec
from tasks.data.open_source import DIGITS, is_image_of_a_class, is_manifest, is_torchvision, open_source
from tasks.stores.base import sha256_of
from tasks.stores.mirror import is_remote, listing_digest
from tasks.stores.steps import library_versions


def data_state(data: DataSpec) -> str:
    """SHA-256 of names, sizes and times of change of all files, or of names and ETags in S3.

    Raises:
        DataError: if there are no images.
        StoreError: if S3 cannot be listed.
    """
    sources = [source for source in (data.source, data.gate_source) if source is not None]
    states = [list(_states(source, data.root)) for source in sources]
    return hashlib.sha256(json.dumps([data.model_dump(mode="json"), states]).encode()).hexdigest()


def _states(source: str, root: str | None) -> Iterator[str]:
    if source == DIGITS:
        yield library_versions("scikit-learn")["scikit-learn"]
    elif is_torchvision(source):
        yield library_versions("torchvision")["torchvision"]
        for path in sorted(Path(root or ".").rglob("*")):
            state = path.stat()
            yield f"{path} {state.st_size} {state.st_mtime_ns}"
    elif not (is_remote(source) or is_remote(str(root))):
        yield open_source(source, root).fingerprint()
    elif not is_manifest(source):
        yield listing_digest(source, is_image_of_a_class)
    else:  # what a manifest in S3 lists is in it, so all that lies beside it counts
        yield listing_digest(source) if is_remote(source) else sha256_of(Path(source))
        yield listing_digest(root or source.rpartition("/")[0])
