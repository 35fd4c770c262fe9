"""Releases, the champion, and what becomes of them in races, kills and wrong hands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.contracts.errors import GateRejected, ReleaseError, RequantError, StoreError, TransientStoreError
from tasks.contracts.records import ArtifactRef
from tasks.contracts.release import Promotion, Release
from tasks.stores.base import Store, open_store
from tasks.stores.local import LocalStore
from tasks.stores.registry import (
    champion,
    compare,
    left_behind,
    lineage,
    numbers,
    promote,
    publish,
    read_release,
    released_before,
    retire,
    rollback,
    verify,
)
from tasks.stores.signing import Keys, key_id
from tasks.stores.steps import refs_in
from tests.tasks.stores.releases import NAME, a_run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def releases(store: Store, folder: Path, count: int, keys: Keys) -> list[Release]:
    return [publish(store, a_run(store, folder, f"run{number}"), keys) for number in range(1, count + 1)]


def key_of(number: int) -> str:
    return f"models/{NAME}/releases/{number}"


def edited(store: Store, number: int, **changes: Any) -> None:
    """What somebody with access to the store could do."""
    document = json.loads(store.read_text(key_of(number)) or "")
    store.write_text(key_of(number), json.dumps({**document, **changes}))


# Publishing


def test_a_release_holds_all_of_its_run_and_verifies(either: Store, tmp_path: Path, keys: Keys) -> None:
    """It reads back as it was published; every artifact is fetched, and the signature is that of the trusted key."""
    candidate = a_run(either, tmp_path, "run1")
    release = publish(either, candidate, keys)
    assert (release.number, release.parent, release.run) == (1, None, "run1")
    assert {**dict(release), **dict(candidate)} == dict(release)
    found = verify(either, NAME, 1, keys)
    assert found.release == release
    assert found.signature == f"signed by {key_id(keys.signer.public_key())}, which is trusted"  # type: ignore[union-attr]


def test_a_run_is_released_once(either: Store, tmp_path: Path, keys: Keys) -> None:
    """Publishing again, as after a crash, gives the same release; another run gets the next number."""
    candidate = a_run(either, tmp_path, "run1")
    first = publish(either, candidate, keys)
    second = publish(either, a_run(either, tmp_path, "run2"), keys)
    assert publish(either, candidate, keys) == first
    assert second.number == 2
    assert numbers(either, NAME) == [1, 2]


def test_the_parent_is_the_champion_at_that_time(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """Not the release before it."""
    releases(store, tmp_path, 2, keys)
    promote(store, NAME, 1, keys)
    assert publish(store, a_run(store, tmp_path, "run3"), keys).parent == 1


def test_a_rejected_run_is_not_released(store: LocalStore, tmp_path: Path) -> None:
    """Whatever it is called by."""
    with pytest.raises(GateRejected, match="run1 of birds did not pass"):
        publish(store, a_run(store, tmp_path, "run1", passed=False))
    assert numbers(store, NAME) == []


@pytest.mark.parametrize("field", ["float_onnx", "int8_onnx", "record", "report"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_what_is_not_held_in_full_is_not_released(store: LocalStore, tmp_path: Path, field: str, damage: str) -> None:
    """Each artifact is looked at before anything is written."""
    candidate = a_run(store, tmp_path, "run1")
    ref: ArtifactRef = getattr(candidate, field)
    if damage == "gone":
        store.delete(ref.key)
    else:
        store.write_text(ref.key, "x")
    with pytest.raises(ReleaseError, match=rf"{ref.key} is not in .* in full. Run again"):
        publish(store, candidate)
    assert numbers(store, NAME) == []


def test_what_would_not_be_trusted_is_not_released(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """It could never be promoted: keys are trusted here, and nobody signs, or somebody else does."""
    candidate = a_run(store, tmp_path, "run1")
    for signer in (None, Ed25519PrivateKey.generate()):
        with pytest.raises(ReleaseError, match="A new release of birds is refused"):
            publish(store, candidate, Keys(signer=signer, trusted=keys.trusted))
    assert numbers(store, NAME) == []


def test_a_number_is_never_given_twice(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """Not even where the newest release was deleted by hand: the log still names it."""
    releases(store, tmp_path, 2, keys)
    promote(store, NAME, 2, keys)
    store.delete(key_of(2))
    assert publish(store, a_run(store, tmp_path, "run3"), keys).number == 3


def test_a_spoilt_release_is_not_in_the_way_of_the_next(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """It is refused by itself, and production goes on."""
    releases(store, tmp_path, 1, keys)
    store.write_text(key_of(1), "{")
    assert publish(store, a_run(store, tmp_path, "run2"), keys).number == 2


def test_the_same_engine_is_known_again(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """As the champion, or as what was rolled back since; not as any older release."""
    first = publish(store, a_run(store, tmp_path, "run1", engine="one"), keys)
    second = publish(store, a_run(store, tmp_path, "run2", engine="two"), keys)

    def known(release: Release) -> int | None:
        found = released_before(store, NAME, release.engines, release.serving, keys)
        return None if found is None else found.number

    assert (known(first), known(second)) == (None, None)
    promote(store, NAME, 1, keys)
    assert (known(first), known(second)) == (1, None)
    promote(store, NAME, 2, keys)
    assert (known(first), known(second)) == (None, 2)
    rollback(store, NAME, keys)
    assert (known(first), known(second)) == (1, 2)
    promote(store, NAME, 1, keys)
    assert (known(first), known(second)) == (1, None)


def test_what_a_killed_run_left_unpromoted_is_known(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """The newest release alone, of exactly these engines, and only until it was champion."""
    first = publish(store, a_run(store, tmp_path, "run1", engine="one"), keys)

    def left(release: Release) -> int | None:
        found = left_behind(store, NAME, release.engines, release.serving, keys)
        return None if found is None else found.number

    assert left(first) == 1
    second = publish(store, a_run(store, tmp_path, "run2", engine="two"), keys)
    assert (left(first), left(second)) == (None, 2)
    promote(store, NAME, 2, keys)
    assert left(second) is None
    third = publish(store, a_run(store, tmp_path, "run3", engine="three"), keys)
    retire(store, NAME, {3})
    assert left(third) is None


# Promoting


def test_the_champion_moves_and_the_log_tells(either: Store, tmp_path: Path, keys: Keys) -> None:
    """Promotions and rollbacks in order, each with what was before."""
    releases(either, tmp_path, 3, keys)
    for number in (1, 2, 3):
        promote(either, NAME, number, keys)
    assert rollback(either, NAME, keys).release == 2
    assert rollback(either, NAME, keys).release == 1
    promote(either, NAME, 3, keys)
    assert rollback(either, NAME, keys).release == 1
    now = champion(either, NAME)
    assert now.release == 1
    assert [(entry.sequence, entry.release, entry.previous, entry.why) for entry in now.log] == [
        (1, 1, None, "promote"),
        (2, 2, 1, "promote"),
        (3, 3, 2, "promote"),
        (4, 2, 3, "rollback"),
        (5, 1, 2, "rollback"),
        (6, 3, 1, "promote"),
        (7, 1, 3, "rollback"),
    ]
    with pytest.raises(ReleaseError, match="no champion before this one"):
        rollback(either, NAME, keys)
    assert lineage(now) == [1]


def test_two_rollbacks_at_once_are_one(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """Whoever comes second is told that the champion has changed, and does not go one further back."""

    class Rival(LocalStore):
        def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
            rollback(store, NAME, keys)
            return super()._write_if(key, content, expected)

    releases(store, tmp_path, 3, keys)
    for number in (1, 2, 3):
        promote(store, NAME, number, keys)
    with pytest.raises(ReleaseError, match="Release 2 of birds has become champion meanwhile, instead of 3"):
        rollback(Rival(tmp_path / "store"), NAME, keys)
    assert champion(store, NAME).release == 2


def test_a_retired_release_is_not_promoted(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """It may be half deleted. The champion cannot be retired."""
    releases(store, tmp_path, 2, keys)
    promote(store, NAME, 2, keys)
    retire(store, NAME, {1})
    with pytest.raises(ReleaseError, match="Release 1 of birds is retired"):
        promote(store, NAME, 1, keys)
    with pytest.raises(ReleaseError, match="Release 2 of birds has become champion"):
        retire(store, NAME, {2})


@pytest.mark.parametrize("is_written", [True, False])
def test_an_answer_that_got_lost_is_found_in_the_log(
    store: LocalStore, tmp_path: Path, keys: Keys, is_written: bool
) -> None:
    """Whether or not the write had arrived, there is one release and one entry."""
    lost: list[str] = []

    class Losing(LocalStore):
        def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
            if key in lost:
                return super()._write_if(key, content, expected)
            lost.append(key)
            if is_written:
                super()._write_if(key, content, expected)
            raise TransientStoreError("The connection broke off.")

    losing = Losing(tmp_path / "store")
    release = publish(losing, a_run(store, tmp_path, "run1"), keys)
    promotion = promote(losing, NAME, release.number, keys)
    assert lost == [key_of(1), f"models/{NAME}/champion"]
    assert numbers(store, NAME) == [1]
    assert champion(store, NAME).log == (promotion,)


def test_a_store_that_stays_in_trouble_is_an_error(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own, after some patience; the same with others that are always quicker."""
    monkeypatch.setattr("tasks.stores.registry._PATIENCE_S", 0.1)
    publish(store, a_run(store, tmp_path, "run1"))

    class Broken(LocalStore):
        def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
            raise TransientStoreError("The connection broke off.")

    class Slow(LocalStore):
        def _write_if(self, key: str, content: bytes, expected: str | None) -> str | None:
            return None

    for kind, message in ((Broken, "The connection broke off"), (Slow, "others are always quicker")):
        with pytest.raises(TransientStoreError, match=message):
            promote(kind(tmp_path / "store"), NAME, 1)


def test_a_pointer_to_a_release_that_is_gone_is_told(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """By name and number, with those that there are; another release can be promoted over it."""
    releases(store, tmp_path, 2, keys)
    for number in (1, 2):
        promote(store, NAME, number, keys)
    store.delete(key_of(2))
    with pytest.raises(ReleaseError, match=r"birds has no release 2 in .*: there are 1\."):
        verify(store, NAME, 2, keys)
    assert rollback(store, NAME, keys).release == 1


def test_a_damaged_pointer_is_told(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """And not written over."""
    releases(store, tmp_path, 1, keys)
    store.write_text(f"models/{NAME}/champion", "[]")
    with pytest.raises(StoreError, match=r"models/birds/champion in .* is damaged"):
        promote(store, NAME, 1, keys)
    assert store.read_text(f"models/{NAME}/champion") == "[]"


# Wrong hands


@pytest.mark.parametrize("damage", ["changed", "gone", "short"])
def test_an_artifact_that_is_not_the_released_one_is_refused(
    either: Store, tmp_path: Path, keys: Keys, damage: str
) -> None:
    """By verification, and so by promotion: bytes of the same number, fewer bytes, or none."""
    (release,) = releases(either, tmp_path, 1, keys)
    ref = release.engines[0].engine
    if damage == "gone":
        either.delete(ref.key)
    else:
        either.write_text(ref.key, "x" * (ref.size_bytes if damage == "changed" else 3))
    with pytest.raises(StoreError, match=rf"{ref.key}.* is (damaged|not in)"):
        promote(either, NAME, 1, keys)
    assert champion(either, NAME).release is None


@pytest.mark.parametrize(
    "changes",
    [
        {"created": "2020-01-01T00:00:00+00:00"},
        {"run": "other"},
        {"scores": {}},
        {"unknown": 1},
        {"signature": {"key_id": "", "value": ""}},
        {"signature": {"value": "AAAA"}},
        {"signature": None},
        {"signature": "no"},
    ],
    ids=str,
)
def test_a_document_that_was_changed_is_refused(
    either: Store, tmp_path: Path, keys: Keys, changes: dict[str, Any]
) -> None:
    """Whichever field it is, the signature's own too, and before anything else of it is believed."""
    releases(either, tmp_path, 1, keys)
    edited(either, 1, **changes)
    with pytest.raises(ReleaseError, match=r"Release 1 of birds in .* is (refused|damaged)"):
        verify(either, NAME, 1, keys)


@pytest.mark.parametrize("position", [0, 64, 127])
def test_a_changed_signature_is_refused(store: LocalStore, tmp_path: Path, keys: Keys, position: int) -> None:
    """One letter is enough."""
    (release,) = releases(store, tmp_path, 1, keys)
    assert release.signature is not None
    value = release.signature.value
    other = "0" if value[position] != "0" else "1"
    changed = f"{value[:position]}{other}{value[position + 1 :]}"
    edited(store, 1, signature={"key_id": release.signature.key_id, "value": changed})
    with pytest.raises(ReleaseError, match="was changed after it was signed"):
        verify(store, NAME, 1, keys)


def test_an_unknown_key_is_refused(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """A good signature of somebody else; calling it by a trusted name does not help."""
    stranger = Ed25519PrivateKey.generate()
    (release,) = releases(store, tmp_path, 1, Keys(signer=stranger))
    assert release.signature is not None
    with pytest.raises(
        ReleaseError, match=rf"signed by {release.signature.key_id}, a key that is not trusted.*TRUSTED"
    ):
        verify(store, NAME, 1, keys)
    edited(store, 1, signature={"key_id": next(iter(keys.trusted)), "value": release.signature.value})
    with pytest.raises(ReleaseError, match="was changed after it was signed"):
        verify(store, NAME, 1, keys)


def test_without_keys_it_says_unsigned(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """Plainly; and where keys are trusted, an unsigned release is refused."""
    releases(store, tmp_path, 1, Keys())
    assert verify(store, NAME, 1).signature == "unsigned"
    with pytest.raises(ReleaseError, match=r"is refused. It is unsigned. Release it where REQUANT_SIGNING_KEY is set"):
        verify(store, NAME, 1, keys)
    publish(store, a_run(store, tmp_path, "run2"), keys)
    assert verify(store, NAME, 2).signature.endswith("not checked: no key is trusted here")


def test_a_release_in_anothers_place_is_refused(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """An old one under a new number, or one of another model, with its good signature."""
    releases(store, tmp_path, 2, keys)
    old = store.read_text(key_of(1)) or ""
    store.write_text(key_of(2), old)
    store.write_text("models/cats/releases/1", old)
    for name, number in ((NAME, 2), ("cats", 1)):
        with pytest.raises(ReleaseError, match=rf"Release {number} of {name} .* says that it is release 1 of birds"):
            verify(store, name, number, keys)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '"' + "x" * 100 + '"'])
@pytest.mark.parametrize("is_keyed", [True, False])
def test_what_is_no_release_is_refused(
    store: LocalStore, tmp_path: Path, keys: Keys, text: str, is_keyed: bool
) -> None:
    """As damaged or unsigned, in one line."""
    store.write_text(key_of(1), text)
    with pytest.raises(ReleaseError, match=r"Release 1 of birds in .* is (refused|damaged)"):
        read_release(store, NAME, 1, keys if is_keyed else Keys())


@pytest.mark.parametrize("key", ["../outside", "objects/../../outside", "/etc/passwd"])
def test_an_artifact_outside_the_store_is_refused(store: LocalStore, tmp_path: Path, key: str) -> None:
    """Nothing is read there, signed or not."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    (release,) = releases(store, tmp_path, 1, Keys())
    report = release.report.model_copy(update={"key": key}).model_dump()
    edited(store, 1, report=report)
    with pytest.raises(StoreError, match="is not a key"):
        verify(store, NAME, 1)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a/../b", "/etc", "Birds", "a\n", "a b"])
def test_a_name_that_could_lead_elsewhere_is_refused(store: LocalStore, name: str) -> None:
    """By every operation."""
    for refused in (
        lambda: champion(store, name),
        lambda: numbers(store, name),
        lambda: promote(store, name, 1),
        lambda: rollback(store, name),
        lambda: read_release(store, name, 1),
    ):
        with pytest.raises(RequantError, match="is not the name of a model"):
            refused()


def test_two_releases_are_compared(store: LocalStore, tmp_path: Path) -> None:
    """All that differs and nothing else."""
    one, other = releases(store, tmp_path, 2, Keys())
    assert [*compare(one, one)] == []
    scores = other.scores.model_copy(update={"int8_top1": 90.0})
    provenance = other.provenance.model_copy(update={"libraries": {"torch": "2.15.0", "onnx": "1.20"}})
    differences = {
        field: values
        for field, *values in compare(one, other.model_copy(update={"scores": scores, "provenance": provenance}))
    }
    assert differences.pop("engines.0.engine.sha256") == [one.int8_onnx.sha256, other.int8_onnx.sha256]
    assert differences.pop("engines.0.engine.key")
    assert differences == {
        "scores.int8_top1": ["91.5", "90"],
        "provenance.libraries.torch": ["2.14.0", "2.15.0"],
        "provenance.libraries.onnx": ["none", "1.20"],
        "provenance.weights": [one.provenance.weights, other.provenance.weights],
    }


# Races and kills

PROMOTER = """
import sys
from tasks.stores.base import open_store
from tasks.stores.registry import promote
url, number, count = sys.argv[1:]
store = open_store(url)
for _ in range(int(count)):
    print(promote(store, "birds", int(number)).model_dump_json(), flush=True)
"""


def test_promotions_in_a_race_have_one_order(
    either: Store, either_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Eight processes: every promotion that returned is in the log once, each knows the one before it."""
    count = 25 if isinstance(either, LocalStore) else 4
    releases(either, tmp_path, 8, Keys())
    promoters = [
        subprocess.Popen([sys.executable, "-c", PROMOTER, either_url, str(number), str(count)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(1, 9)
    ]  # fmt: skip
    ended = [promoter.communicate(timeout=120) for promoter in promoters]
    assert [promoter.returncode for promoter in promoters] == [0] * 8, ended
    returned = [Promotion.model_validate_json(line) for stdout, _ in ended for line in stdout.splitlines()]
    now = champion(either, NAME)
    assert sorted(returned, key=lambda promotion: promotion.sequence) == list(now.log)
    assert [promotion.sequence for promotion in now.log] == list(range(1, 8 * count + 1))
    assert len({promotion.id for promotion in now.log}) == 8 * count
    assert [promotion.previous for promotion in now.log] == [None, *(entry.release for entry in now.log[:-1])]
    assert now.release == now.log[-1].release


PUBLISHER = """
import sys
from pathlib import Path
from tasks.stores.base import open_store
from tasks.stores.registry import publish
from tests.tasks.stores.releases import a_run
url, folder, letter, count = sys.argv[1:]
store = open_store(url)
Path(folder).mkdir()
for turn in range(int(count)):
    candidate = a_run(store, Path(folder), f"run{turn}" if letter in "ab" else f"{letter}{turn}")
    print(publish(store, candidate).number)
"""


def test_publishers_in_a_race_get_numbers_of_their_own(either: Store, either_url: str, tmp_path: Path) -> None:
    """Four processes, two of which release the same runs: as many releases as runs, none with a gap before it."""
    count = 6 if isinstance(either, LocalStore) else 2
    publishers = [
        subprocess.Popen([sys.executable, "-c", PUBLISHER, either_url, str(tmp_path / letter), letter, str(count)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for letter in "abcd"
    ]  # fmt: skip
    ended = [publisher.communicate(timeout=120) for publisher in publishers]
    assert [publisher.returncode for publisher in publishers] == [0] * 4, ended
    given = [stdout.split() for stdout, _ in ended]
    assert given[0] == given[1]
    assert sorted(int(number) for each in given[1:] for number in each) == list(range(1, 3 * count + 1))
    assert numbers(either, NAME) == list(range(1, 3 * count + 1))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from tasks.stores.base import open_store
from tasks.stores.registry import champion, numbers, promote, publish, verify
from tests.tasks.stores.releases import NAME, a_run
url, folder, kills, longest_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
store, chance, verified, promoted = open_store(url), random.Random(int(sys.argv[5])), set(), 0
candidate = a_run(store, folder, "run")
for turn in range(kills):
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        own = open_store(url)
        own.compare_and_set()
        os.write(tell, b".")
        for step in range(1000):
            new = candidate.model_copy(update={"run": f"run{turn}-{step}"})
            promote(own, NAME, publish(own, new).number)
            os.write(tell, b".")
    os.close(tell)
    os.read(ready, 1)
    if turn % 4 == 3:
        os.read(ready, 1)  # one promotion is through, however slow the machine
    os.close(ready)
    time.sleep(chance.uniform(0, longest_s))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child has failed by itself"
    there = numbers(store, NAME)
    assert there == list(range(1, len(there) + 1))
    for number in set(there) - verified:
        verify(store, NAME, number)
    verified |= set(there)
    now = champion(store, NAME)
    assert [entry.sequence for entry in now.log] == list(range(1, len(now.log) + 1))
    assert all(entry.release in verified for entry in now.log)
    assert promoted <= len(now.log)
    promoted = len(now.log)
print(len(verified), promoted)
"""


def test_whoever_is_killed_leaves_what_is_complete(either: Store, either_url: str, tmp_path: Path) -> None:
    """At any point of publishing and promoting: a release is there and verified, or absent; the log never breaks."""
    kills, longest_s = ("60", "0.06") if isinstance(either, LocalStore) else ("12", "0.6")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, either_url, str(tmp_path), kills, longest_s, "1"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    published, promoted = map(int, ended.stdout.split())
    assert 0 < promoted <= published
    for number in numbers(either, NAME):
        assert all(either.holds(ref) for ref in refs_in(read_release(either, NAME, number).release))
    publish(open_store(either_url), a_run(either, tmp_path, "after"))
