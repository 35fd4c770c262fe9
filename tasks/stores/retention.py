"""What may be deleted. Of each model are kept:

- the champion, and the `keep_releases` champions before it that rollbacks would go back through;
- the newest `keep_releases` releases, and all that are younger than `keep_days`;
- the runs of all these, and all runs younger than `keep_days`;
- every object that a kept document refers to, and every object younger than the grace period.

Records of steps keep nothing: where their artifacts are gone, the step is computed again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tasks.contracts.errors import ReleaseError
from tasks.stores.base import GRACE, Entry, Store
from tasks.stores.registry import champion, lineage, retire


@dataclass(frozen=True)
class _Model:
    """Documents of one model."""

    releases: dict[int, Entry]
    runs: dict[str, list[Entry]]


def collect(
    store: Store,
    *,
    delete: bool = False,
    keep_releases: int = 5,
    keep_days: float = 90,
    grace: timedelta = GRACE,
) -> list[Entry]:
    """What nothing keeps, in the order in which it is deleted; deleted only if `delete` is set.

    Documents go before what they refer to, so whoever stops it in the middle leaves nothing but objects that the next
    one finds. A release is first retired, so that none can become champion while it goes.

    Raises:
        ReleaseError: if a document cannot be read: what it refers to is unknown, and nothing is deleted.
        StoreError: if storage misbehaves.
    """
    now = datetime.now(UTC)
    oldest_young = now - grace
    oldest_kept = min(now - timedelta(days=keep_days), oldest_young)
    objects = store.entries("objects/")  # before the documents, which may come to refer to what is stored meanwhile
    retired: dict[str, dict[int, Entry]] = {}
    runs: list[Entry] = []
    referred: set[str] = set()
    for name, model in _models(store).items():
        kept = {number for number, entry in model.releases.items() if entry.modified >= oldest_kept}
        kept |= {
            *sorted(model.releases)[-max(keep_releases, 1) :],
            *lineage(champion(store, name))[-keep_releases - 1 :],
        }
        documents = [_document(store, model.releases[number].key) for number in kept & model.releases.keys()]
        retired[name] = {number: entry for number, entry in model.releases.items() if number not in kept}
        runs_released = {document.get("run") for document in documents}
        for run, entries in model.runs.items():
            if run in runs_released or max(entry.modified for entry in entries) >= oldest_kept:
                documents += [_document(store, entry.key) for entry in entries if entry.key.endswith(".json")]
            else:  # the record goes first: a run with a record is a run with everything
                runs += sorted(entries, key=lambda entry: not entry.key.endswith("/record.json"))
        referred.update(_keys_in(documents))
    unreferred = [entry for entry in objects if entry.key not in referred and entry.modified < oldest_young]
    if delete:
        for name, releases in retired.items():
            retire(store, name, set(releases))
    going = [entry for releases in retired.values() for entry in releases.values()] + runs + unreferred
    return [entry for entry in going if not delete or _deleted(store, entry)]


def _models(store: Store) -> dict[str, _Model]:
    models: dict[str, _Model] = defaultdict(lambda: _Model({}, defaultdict(list)))
    for entry in store.entries("models/"):
        match entry.key.split("/"):
            case [_, name, "releases", number] if number.isdecimal():
                models[name].releases[int(number)] = entry
            case [_, name, "runs", run, _, *_]:
                models[name].runs[run].append(entry)
    return models


def _document(store: Store, key: str) -> dict[str, Any]:
    """As plain JSON, so that those of all versions are understood."""
    try:
        document = json.loads(store.read_text(key) or "{}")
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ReleaseError(
            f"{key} in {store} is damaged, so what it refers to is not known. Nothing is deleted.",
            remedy="Restore it, or delete it yourself.",
        )
    return document


def _keys_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if {"key", "sha256"} <= value.keys():
            yield str(value["key"])
        for item in value.values():
            yield from _keys_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys_in(item)


def _deleted(store: Store, entry: Entry) -> bool:
    """Not if it was written or renewed since the list was made."""
    found = store.entry(entry.key)
    if found is None or found.modified > entry.modified:
        return False
    store.delete(entry.key)
    return True
