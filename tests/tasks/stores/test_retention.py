"""What is deleted, what is kept, and that it may be stopped at any point."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tasks.contracts.errors import ReleaseError, StoreError
from tasks.contracts.records import ArtifactRef
from tasks.stores.base import Store
from tasks.stores.local import LocalStore
from tasks.stores.registry import champion, numbers, promote, publish, read_release, rollback, verify
from tasks.stores.retention import collect
from tasks.stores.signing import NO_KEYS
from tasks.stores.steps import refs_in
from tests.tasks.stores.releases import NAME, a_run, put

NONE_YOUNG = {"keep_days": 0.0, "grace": timedelta(0)}


def filled(store: Store, folder: Path, count: int) -> None:
    """Releases that were each champion, a run that was rejected, one that never ended, and two objects of nobody."""
    for number in range(1, count + 1):
        publish(store, a_run(store, folder, f"run{number}"), NO_KEYS)
        promote(store, NAME, number)
    a_run(store, folder, "rejected", passed=False)
    store.write_text(f"models/{NAME}/runs/unended/data.html", "<html>")
    store.write_text(f"models/{NAME}/data.html", "<html>")
    store.write_text("steps/score/0.json", "{}")
    put(store, folder, "nobody's", "state")
    put(store, folder, "nobody's either", "state")


def age(root: Path, days: float) -> None:
    """Make everything older."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * 86400,) * 2)


def check_whole(store: Store) -> None:
    """No release, and no run with a record, refers to what is gone."""
    for number in numbers(store, NAME):
        verify(store, NAME, number)
    records = [key for key in store.list(f"models/{NAME}/runs/") if key.endswith("record.json")]
    for key in records:
        record = json.loads(store.read_text(key) or "")
        assert store.holds(ArtifactRef(**record["weights"]))
        assert store.holds(ArtifactRef(**record["engine"]))
        assert store.entry(key.replace("record.json", "report.html")) is not None
    assert champion(store, NAME).release in numbers(store, NAME)


def test_what_nothing_keeps_goes(either: Store, tmp_path: Path) -> None:
    """First it is only told, with sizes; champion, one before it, its run and its weights stay."""
    filled(either, tmp_path, 4)
    if not isinstance(either, LocalStore):
        time.sleep(1.1)  # the server tells whole seconds
    before = {entry.key: entry.size_bytes for entry in either.entries("")}
    would = collect(either, keep_releases=1, grace=timedelta(0), keep_days=0)
    assert {entry.key: entry.size_bytes for entry in either.entries("")} == before
    assert all(before[entry.key] == entry.size_bytes for entry in would)

    deleted = collect(either, delete=True, keep_releases=1, grace=timedelta(0), keep_days=0)
    assert [entry.key for entry in deleted] == [entry.key for entry in would]
    assert {key for key in before if either.entry(key) is None} == {entry.key for entry in deleted}
    assert numbers(either, NAME) == [3, 4]
    assert {key.split("/")[3] for key in either.list(f"models/{NAME}/runs/")} == {"run3", "run4"}
    assert len(either.list("objects/weights/")) == 2
    assert either.list("objects/state/") == []
    assert either.list("steps/") == ["steps/score/0.json"]
    assert either.read_text(f"models/{NAME}/data.html") is not None
    check_whole(either)
    assert collect(either, delete=True, keep_releases=1, grace=timedelta(0), keep_days=0) == []
    assert rollback(either, NAME).release == 3


def test_documents_go_before_what_they_refer_to(tmp_path: Path) -> None:
    """Releases, then runs with their record first, then objects."""
    store = LocalStore(tmp_path / "store")
    filled(store, tmp_path, 3)
    keys = [entry.key for entry in collect(store, keep_releases=1, **NONE_YOUNG)]  # type: ignore[arg-type]
    assert keys[0] == f"models/{NAME}/releases/1"
    kinds = [key.split("/")[0] for key in keys]
    assert kinds == sorted(kinds)
    assert keys.index(f"models/{NAME}/runs/run1/record.json") < keys.index(f"models/{NAME}/runs/run1/report.html")


def test_stopped_at_any_point_it_leaves_whole_releases(tmp_path: Path) -> None:
    """And the next one comes to the same end."""
    origin = LocalStore(tmp_path / "origin")
    filled(origin, tmp_path, 4)
    total = len(collect(origin, keep_releases=1, **NONE_YOUNG))  # type: ignore[arg-type]
    whole = LocalStore(shutil.copytree(tmp_path / "origin", tmp_path / "whole"))
    collect(whole, delete=True, keep_releases=1, **NONE_YOUNG)  # type: ignore[arg-type]

    class Dying(LocalStore):
        left = 0

        def _delete(self, key: str) -> None:
            if not self.left:
                raise StoreError("Killed.")
            self.left -= 1
            super()._delete(key)

    for deletes in range(total):
        path = shutil.copytree(tmp_path / "origin", tmp_path / f"copy{deletes}")
        dying, store = Dying(path), LocalStore(path)
        dying.left = deletes
        with pytest.raises(StoreError, match="Killed"):
            collect(dying, delete=True, keep_releases=1, **NONE_YOUNG)  # type: ignore[arg-type]
        assert len(origin.list("")) - len(store.list("")) == deletes
        check_whole(store)
        collect(store, delete=True, keep_releases=1, **NONE_YOUNG)  # type: ignore[arg-type]
        assert store.list("") == whole.list("")


def test_what_is_young_is_kept(tmp_path: Path) -> None:
    """Releases and runs by keep_days, objects of a run under way by the grace period."""
    store = LocalStore(tmp_path / "store")
    filled(store, tmp_path, 4)
    assert collect(store, keep_releases=1) == []
    age(tmp_path / "store", 30)
    of_nobody = {entry.key for entry in collect(store, keep_releases=1)}
    assert of_nobody > set(store.list("objects/state/"))
    assert all(key.startswith("objects/") for key in of_nobody)
    assert set(store.list("objects/weights/")).isdisjoint(of_nobody)
    assert collect(store, keep_releases=1, grace=timedelta(days=31)) == []
    age(tmp_path / "store", 91)
    assert f"models/{NAME}/releases/1" in {entry.key for entry in collect(store, keep_releases=1)}
    assert collect(store, keep_releases=4, keep_days=92, grace=timedelta(days=92)) == []


def test_an_old_artifact_that_a_run_takes_up_is_kept(tmp_path: Path) -> None:
    """It was found again by a run under way, whose record is not written yet."""
    store = LocalStore(tmp_path / "store")
    ref = put(store, tmp_path, "calibrated", "state")
    age(tmp_path / "store", 30)
    assert [entry.key for entry in collect(store)] == [ref.key]
    assert store.renew(ref)
    assert collect(store, delete=True) == []
    age(tmp_path / "store", 30)

    class Rival(LocalStore):
        """Between the list and the deletion."""

        def entry(self, key: str) -> object:  # type: ignore[override]
            store.put(tmp_path / "state.onnx", kind="state")
            return super().entry(key)

    assert collect(Rival(tmp_path / "store"), delete=True) == []
    assert store.holds(ref)


def test_champions_before_this_one_are_kept_however_old(tmp_path: Path) -> None:
    """Those that rollbacks would go back to; one that was never champion goes."""
    store = LocalStore(tmp_path / "store")
    for number in range(1, 9):
        publish(store, a_run(store, tmp_path, f"run{number}"), NO_KEYS)
    for number in (1, 3, 2):
        promote(store, NAME, number)
    age(tmp_path / "store", 100)
    collect(store, delete=True, keep_releases=2)
    assert numbers(store, NAME) == [1, 2, 3, 7, 8]
    with pytest.raises(ReleaseError, match="has no release 4"):
        promote(store, NAME, 4)
    assert publish(store, a_run(store, tmp_path, "run9"), NO_KEYS).number == 9


def test_a_promotion_and_a_deletion_do_not_cross(tmp_path: Path) -> None:
    """A release that becomes champion while it is being collected stays, with all that it refers to."""
    store = LocalStore(tmp_path / "store")
    filled(store, tmp_path, 4)

    class Rival(LocalStore):
        def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
            if champion(store, NAME).release != 1:
                promote(store, NAME, 1)
            return super()._write_if(key, content, expected)

    before = store.list("")
    with pytest.raises(ReleaseError, match=r"Release 1 of birds has become champion. Collect again"):
        collect(Rival(tmp_path / "store"), delete=True, keep_releases=1, **NONE_YOUNG)  # type: ignore[arg-type]
    assert store.list("") == before
    verify(store, NAME, 1)


@pytest.mark.parametrize("key", ["releases/4", "runs/run4/record.json", "champion"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_where_a_document_cannot_be_read_nothing_is_deleted(tmp_path: Path, key: str, text: str) -> None:
    """What it refers to is unknown."""
    store = LocalStore(tmp_path / "store")
    filled(store, tmp_path, 4)
    store.write_text(f"models/{NAME}/{key}", text)
    before = store.list("")
    with pytest.raises((ReleaseError, StoreError), match=f"models/{NAME}/{key} in .* is damaged"):
        collect(store, delete=True, keep_releases=1, **NONE_YOUNG)  # type: ignore[arg-type]
    assert store.list("") == before


def test_models_share_objects(tmp_path: Path) -> None:
    """What one model's release refers to is kept, whoever stored it."""
    store = LocalStore(tmp_path / "store")
    candidate = a_run(store, tmp_path, "run1")
    publish(store, candidate.model_copy(update={"model": "cats"}), NO_KEYS)
    promote(store, "cats", 1)
    collect(store, delete=True, **NONE_YOUNG)  # type: ignore[arg-type]
    assert all(store.holds(ref) for ref in refs_in(read_release(store, "cats", 1).release))
    assert store.list(f"models/{NAME}/runs/") == []
