"""Releases of a model, and which of them is champion.

    models/<name>/releases/<n>   a release: written once, whole or not at all, signed, never changed
    models/<name>/champion       the release that production serves, and the log of all promotions
    models/<name>/settled        what decided the last good run, written last by each of them

The first two rest on compare-and-set alone: whoever is killed in between leaves a release that nobody serves, no more.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar
from uuid import uuid4

from tasks.contracts.errors import GateRejected, ReleaseError, StoreError, TransientStoreError
from tasks.contracts.records import EngineRecord
from tasks.contracts.release import Candidate, Champion, Promotion, Release, Serving
from tasks.stores.base import Store
from tasks.stores.signing import NO_KEYS, Keys, check_signature, signed
from tasks.stores.steps import refs_in

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_PATIENCE_S = 60.0  # with a store that is in trouble, or a document that many want to change


@dataclass(frozen=True)
class Found:
    """A release as it is stored, and what is to be said of its signature."""

    release: Release
    text: str
    signature: str


def publish(store: Store, candidate: Candidate, keys: Keys = NO_KEYS) -> Release:
    """Make a run's result a release. The same run is released once, however often this is called.

    Raises:
        GateRejected: if a gate did not pass.
        ReleaseError: if an artifact is not held in full, or the release would not be trusted here.
        StoreError: if storage misbehaves; what was written is complete or absent.
    """
    if not candidate.decision.passed:
        raise GateRejected(f"Run {candidate.run} of {candidate.model} did not pass its gates.")
    for ref in refs_in(candidate):
        if not store.renew(ref):
            raise ReleaseError(f"{ref.key} is not in {store} in full.", remedy="Run again: what is missing is redone.")
    others: set[int] = set()

    def attempt() -> Release | None:
        for number in sorted(set(numbers(store, candidate.model)) - others, reverse=True):
            found = _readable(store, candidate.model, number, NO_KEYS)
            if found is not None and found.release.run == candidate.run:
                return found.release
            others.add(number)
        now = champion(store, candidate.model)
        release = Release(
            **dict(candidate),
            number=max({0, *others, *now.retired, *(promotion.release for promotion in now.log)}) + 1,
            created=_now(),
            parent=now.release,
        )
        text = json.dumps(signed(release.model_dump(mode="json"), keys.signer), indent=1)
        new = parse_release(text, f"A new release of {candidate.model}", keys)  # before it is written for nothing
        version = store.write_if(_key(candidate.model, release.number), text, None)
        return None if version is None else new.release

    return _settled(attempt, f"A release of {candidate.model} cannot be written in {store}")


def numbers(store: Store, name: str) -> list[int]:
    """Of all releases that are there, rising."""
    prefix = f"{_home(name)}/releases/"
    found = (key.removeprefix(prefix) for key in store.list(prefix))
    return sorted(int(number) for number in found if number.isdecimal())


def read_release(store: Store, name: str, number: int, keys: Keys = NO_KEYS) -> Found:
    """A release as it was written.

    Raises:
        ReleaseError: if it is not there, was changed, or is not signed as `keys` demand.
    """
    text = store.read_text(_key(name, number))
    if text is None:
        there = numbers(store, name)
        shown = f"there are {', '.join(map(str, there[-5:]))}" if there else "there is none yet"
        raise ReleaseError(f"{name} has no release {number} in {store}: {shown}.", remedy="See `requant releases`.")
    found = parse_release(text, f"Release {number} of {name} in {store}", keys)
    if (found.release.model, found.release.number) != (name, number):
        raise ReleaseError(
            f"Release {number} of {name} in {store} says that it is release {found.release.number} of "
            f"{found.release.model}.",
            remedy="Somebody has put it in another's place: do not use it.",
        )
    return found


def parse_release(text: str, what: str, keys: Keys) -> Found:
    """A release document from anywhere. The signature comes first: nothing of what it refuses is looked at.

    Raises:
        ReleaseError: if it is damaged or not signed as `keys` demand.
    """
    try:
        document: Any = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        signature = check_signature(document, keys.trusted)
        return Found(Release.model_validate(document), text, signature)
    except ReleaseError as error:
        raise ReleaseError(f"{what} is refused. {error.problem}", remedy=error.remedy) from None
    except (ValueError, RecursionError):
        raise ReleaseError(
            f"{what} is damaged, or of another version of requant.", remedy="Use another, or update."
        ) from None


def verify(store: Store, name: str, number: int, keys: Keys = NO_KEYS) -> Found:
    """The release, after every artifact was fetched and its digest compared.

    Raises:
        ReleaseError: as `read_release`.
        StoreError: if an artifact is gone or damaged.
    """
    found = read_release(store, name, number, keys)
    with TemporaryDirectory(prefix="requant-verify-") as folder:
        for ref in set(refs_in(found.release)):
            store.fetch(ref, Path(folder)).unlink()
    return found


def champion(store: Store, name: str) -> Champion:
    """Who is champion, and how it came to that; with an empty log if nothing was ever promoted."""
    return _champion(store, name)[0]


def promote(store: Store, name: str, number: int, keys: Keys = NO_KEYS) -> Promotion:
    """Make a verified release the champion.

    Raises:
        ReleaseError: if it is refused by `verify`, or retired.
        StoreError: if storage misbehaves. After a TransientStoreError the log tells whether it was moved.
    """
    verify(store, name, number, keys)
    return _move(store, name, number, "promote")


def rollback(store: Store, name: str, keys: Keys = NO_KEYS) -> Promotion:
    """Make the champion before this one the champion again. A second rollback goes one further back.

    Raises:
        ReleaseError: if there was none before, it is refused by `verify`, or the champion changed meanwhile.
        StoreError: as `promote`.
    """
    now = champion(store, name)
    line = lineage(now)
    if len(line) < 2:
        raise ReleaseError(f"{name} has no champion before this one.", remedy="Promote a release by its number.")
    verify(store, name, line[-2], keys)
    return _move(store, name, line[-2], "rollback", instead_of=now.release)


def last_good_run(store: Store, name: str) -> datetime | None:
    """When a run last passed all gates or found nothing changed, by the clock of the store; None if none has."""
    settled = store.entry(settled_key(name))
    if settled is not None:
        return settled.modified
    for key, _ in passed_records(store, name):
        entry = store.entry(key)
        if entry is not None:
            return entry.modified
    return None


def passed_records(store: Store, name: str) -> Iterator[tuple[str, Any]]:
    """Keys and records of the runs of `name` that passed their gates, the newest first; none that cannot be read."""
    for key in reversed(store.list(f"models/{name}/runs/")):  # names of runs rise with time
        if key.endswith("/record.json"):
            try:
                record = json.loads(store.read_text(key) or "{}")
            except ValueError:
                continue
            match record:
                case {"decision": {"passed": True}}:
                    yield key, record


def lineage(now: Champion) -> list[int]:
    """Champions that rollbacks would go back through, the present one last."""
    line: list[int] = []
    for promotion in now.log:
        if promotion.why == "rollback":
            del line[-1:]
        if line[-1:] != [promotion.release]:
            line.append(promotion.release)
    return line


def released_before(
    store: Store, name: str, engines: tuple[EngineRecord, ...], serving: Serving, keys: Keys = NO_KEYS
) -> Release | None:
    """The champion, or a release that it was rolled back from, if it is exactly these engines.

    A run that finds nothing new must neither make a new release, nor undo what a person has rolled back.
    """
    now = champion(store, name)
    latest = list(takewhile(lambda promotion: promotion.why == "rollback", reversed(now.log)))
    for number in (now.release, *(promotion.previous for promotion in latest)):
        found = None if number is None else _readable(store, name, number, keys)
        if found and (found.release.engines, found.release.serving) == (engines, serving):
            return found.release
    return None


def left_behind(
    store: Store, name: str, engines: tuple[EngineRecord, ...], serving: Serving, keys: Keys = NO_KEYS
) -> Release | None:
    """The newest release, if it is exactly these engines and never was champion.

    A run that was killed between publishing and promoting has left it; the next one has only to promote it.
    """
    newest, now = max(numbers(store, name), default=None), champion(store, name)
    if newest is None or newest in now.retired or newest in {promotion.release for promotion in now.log}:
        return None
    found = _readable(store, name, newest, keys)
    same = found and (found.release.engines, found.release.serving) == (engines, serving)
    return found.release if found and same else None


def compare(one: Release, other: Release) -> Iterator[tuple[str, str, str]]:
    """Field, value and value of all that differs in scores, engines, serving and provenance."""
    sections = {"scores", "engines", "serving", "provenance"}
    before, after = (dict(_flat("", release.model_dump(include=sections))) for release in (one, other))
    for field in {**before, **after}:
        values = before.get(field, "none"), after.get(field, "none")
        if values[0] != values[1]:
            yield (field, *values)


def retire(store: Store, name: str, retired: set[int]) -> None:
    """From now on these releases cannot become champion.

    Raises:
        ReleaseError: if one of them is champion by now.
    """

    def attempt() -> bool | None:
        now, version = _champion(store, name)
        if now.release in retired:
            raise ReleaseError(f"Release {now.release} of {name} has become champion.", remedy="Collect again.")
        new = now.model_copy(update={"retired": tuple(sorted(retired.union(now.retired)))})
        is_done = new == now or store.write_if(_pointer(name), new.model_dump_json(indent=1), version) is not None
        return is_done or None

    _settled(attempt, f"Releases of {name} cannot be retired in {store}")


def _move(
    store: Store, name: str, number: int, why: Literal["promote", "rollback"], *, instead_of: int | None = None
) -> Promotion:
    """Add to the log. Of an attempt whose answer got lost, its id in the log tells."""
    own_id = uuid4().hex

    def attempt() -> Promotion | None:
        now, version = _champion(store, name)
        for promotion in reversed(now.log):
            if promotion.id == own_id:
                return promotion
        if number in now.retired:
            raise ReleaseError(f"Release {number} of {name} is retired.", remedy="Promote another.")
        if instead_of not in (None, now.release):
            raise ReleaseError(
                f"Release {now.release} of {name} has become champion meanwhile, instead of {instead_of}.",
                remedy="See `requant history`, and roll back again if that is still what you want.",
            )
        promotion = Promotion(
            sequence=len(now.log) + 1, release=number, previous=now.release, when=_now(), why=why, id=own_id
        )
        new = now.model_copy(update={"release": number, "log": (*now.log, promotion)})
        version = store.write_if(_pointer(name), new.model_dump_json(indent=1), version)
        return None if version is None else promotion

    return _settled(attempt, f"The champion of {name} cannot be moved in {store}")


def _settled(attempt: Callable[[], T | None], problem: str) -> T:
    """What the first attempt gives that is neither too late (None) nor met by trouble that can pass."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        trouble: TransientStoreError | None = None
        try:
            result = attempt()
            if result is not None:
                return result
        except TransientStoreError as error:
            trouble = error
        if time.monotonic() > deadline:
            raise trouble or TransientStoreError(f"{problem}: others are always quicker.", remedy="Try again.")
        time.sleep(random.uniform(0, 1.0 if trouble else 0.05))  # noqa: S311


def _readable(store: Store, name: str, number: int, keys: Keys) -> Found | None:
    """The release; None if it is refused: one that is spoilt must not be in the way of a new one."""
    try:
        return read_release(store, name, number, keys)
    except ReleaseError:
        return None


def _champion(store: Store, name: str) -> tuple[Champion, str | None]:
    found = store.read_versioned(_pointer(name))
    if found is None:
        return Champion(), None
    try:
        return Champion.model_validate_json(found.text), found.version
    except ValueError:
        raise StoreError(
            f"{_pointer(name)} in {store} is damaged, or of another version of requant.",
            remedy="Restore it from a backup, or delete it and promote a release.",
        ) from None


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(f"{path}.{name}" if path else str(name), item)
    else:
        yield path, f"{value:.6g}" if isinstance(value, float) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _home(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ReleaseError(f"{name!r} is not the name of a model.", remedy="Names are as in specs: a-z, 0-9 and ._-")
    return f"models/{name}"


def _key(name: str, number: int) -> str:
    return f"{_home(name)}/releases/{number}"


def settled_key(name: str) -> str:
    """Of the note of what decided the last good run; each good run writes it."""
    return f"{_home(name)}/settled"


def _pointer(name: str) -> str:
    return f"{_home(name)}/champion"
