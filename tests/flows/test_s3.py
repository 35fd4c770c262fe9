"""The whole flow on a store in S3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tasks.stores.base import open_store
from tasks.stores.loader import pull
from tasks.stores.registry import champion, verify
from tasks.stores.signing import NO_KEYS

if TYPE_CHECKING:
    from tests.flows.conftest import Place
    from tests.tasks.stores.s3_server import S3Server


def test_data_weights_and_store_in_s3(
    place: Place, mobile: dict[str, Any], s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    """From images and a checkpoint in a bucket to a champion there; a second run sends and computes nothing anew."""
    client, prefix = s3_server.client(), urlsplit(s3_url).path.lstrip("/")
    bucket = urlsplit(s3_url).netloc
    for path in (place.path / "shapes").rglob("*.png"):
        key = f"{prefix}/{path.relative_to(place.path).as_posix()}"
        client.upload_file(str(path), bucket, key)
    client.upload_file(str(place.path / "mobile.safetensors"), bucket, f"{prefix}/mobile.safetensors")

    remote = replace(place, store_url=f"{s3_url}/store")
    sections = {"model": {"weights": f"{s3_url}/mobile.safetensors"}, "data": {"source": f"{s3_url}/shapes"}}
    run = remote.run(mobile, **sections)
    assert run.state.is_completed(), run.log[-3:]
    assert "release 1 of mobile is champion (was none)" in run.log
    store = open_store(f"{s3_url}/store")
    assert champion(store, "mobile").release == 1
    assert verify(store, "mobile", 1).release.run == run.report.run_id
    pulled = pull("mobile", to=tmp_path / "engine", store=store, keys=NO_KEYS)
    assert pulled.engine.stat().st_size == run.report.export.compression.int8_bytes
    assert not place.store.exists()

    again = remote.run(mobile, **sections)
    assert again.state.name == "Unchanged"
    assert (again.state.message or "").endswith("are the same; release 1 stays champion")
    client.upload_file(str(place.path / "shapes/disc/00.png"), bucket, f"{prefix}/shapes/disc/again.png")
    more = remote.run(mobile, **sections)
    (line,) = (line for line in more.log if line.startswith("changed since run"))
    assert "data (" in line
    assert "weights (" not in line
    assert "check_data: done in" in "\n".join(more.log)
