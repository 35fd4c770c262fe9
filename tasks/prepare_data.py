"""Step: read the images once, split them, and list who is in which split."""

from __future__ import annotations

from pathlib import Path

from tasks.contracts.records import DataRecord
from tasks.contracts.spec import RunSpec
from tasks.step import Progress, remember, step, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("prepare data")
def prepare_data(spec: RunSpec) -> DataRecord:
    """Images decoded once, and four splits that share none of them."""
    images = the_images(spec, progress=Progress("decoding images"))

    def compute(store: Store, work: Path) -> DataRecord:
        members = work / "members.parquet"
        images.write_members(members)
        return DataRecord(
            source=spec.data.source,
            class_names=images.class_names,
            counts=images.counts,
            duplicates_dropped=images.duplicates_dropped,
            preprocess=images.preprocess,
            height=images.height,
            width=images.width,
            channels=images.channels,
            digest=images.digest,
            members=store.put(members, kind="members"),
        )

    inputs: dict[str, JSON] = {"data": spec.data.model_dump(mode="json", exclude={"checks"}), "images": images.digest}
    return remember("prepare_data", __name__, inputs, DataRecord, compute)
