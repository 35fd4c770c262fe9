"""What production gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.contracts.errors import ReleaseError, StoreError
from tasks.stores.base import Store
from tasks.stores.loader import pull, verify_folder
from tasks.stores.local import LocalStore
from tasks.stores.registry import promote, publish
from tasks.stores.signing import Keys
from tests.tasks.stores.releases import CPU, GPU, NAME, a_run

FILES = {"engine.onnx", "model.json", "release.json"}


@pytest.fixture
def store(tmp_path: Path, keys: Keys) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    for run in ("run1", "run2"):
        publish(store, a_run(store, tmp_path, run), keys)
    promote(store, NAME, 2, keys)
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_champion_comes_whole(either: Store, tmp_path: Path, keys: Keys) -> None:
    """Engine, model.json and release, in a folder that is made; nothing stays beside it."""
    for run in ("run1", "run2"):
        publish(either, a_run(either, tmp_path, run), keys)
    promote(either, NAME, 2, keys)
    pulled = pull(NAME, to=tmp_path / "a" / "engine", store=either, keys=keys)
    assert pulled.folder == tmp_path / "a" / "engine"
    assert names(pulled.folder) == FILES
    assert names(tmp_path / "a") == {"engine"}
    assert pulled.engine.read_text() == f"run2 for {CPU}"
    assert pulled.release.number == 2
    model = json.loads((pulled.folder / "model.json").read_text())
    assert (model["model"], model["release"], model["engine"]) == (NAME, 2, "engine.onnx")
    assert model["options"] == {"intra_op_num_threads": "1"}
    assert model["serving"]["input"] == {"name": "images", "dtype": "float32", "shape": [None, 3, 224, 224]}
    assert model["serving"]["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert model["serving"]["labels"] == ["robin", "wren"]
    assert verify_folder(pulled.folder, keys) == pulled


def test_any_release_can_be_had(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """By its number."""
    pulled = pull(NAME, to=tmp_path / "old", number=1, store=store, keys=keys)
    assert pulled.engine.read_text() == f"run1 for {CPU}"
    with pytest.raises(ReleaseError, match=r"no release 3 in .*: there are 1, 2\."):
        pull(NAME, to=tmp_path / "new", number=3, store=store, keys=keys)
    with pytest.raises(ReleaseError, match="cats has no champion"):
        pull("cats", to=tmp_path / "new", store=store, keys=keys)
    assert not (tmp_path / "new").exists()


def test_an_engine_is_chosen_by_hardware(tmp_path: Path, keys: Keys) -> None:
    """By a part of its name; where several fit, or none, all are told."""
    store = LocalStore(tmp_path / "store")
    publish(store, a_run(store, tmp_path, "run1", hardware=(CPU, GPU)), keys)
    pulled = pull(NAME, to=tmp_path / "gpu", number=1, hardware="h200", store=store, keys=keys)
    assert pulled.model.hardware == GPU
    assert pulled.engine.read_text() == f"run1 for {GPU}"
    for hardware, found in ((None, "2 engines for any hardware"), ("T4", "0 engines for T4")):
        with pytest.raises(ReleaseError, match=rf"{found}; it has Some CPU .*; NVIDIA H200. Name one with --hardware"):
            pull(NAME, to=tmp_path / "x", number=1, hardware=hardware, store=store, keys=keys)


def test_a_folder_that_is_there_is_kept(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """It will do if it holds this very release, and is left alone if it holds anything else; an empty one is filled."""
    target = tmp_path / "engine"
    target.mkdir()
    first = pull(NAME, to=target, store=store, keys=keys)
    written = first.engine.stat().st_mtime_ns
    assert pull(NAME, to=target, store=store, keys=keys) == first
    with pytest.raises(ReleaseError, match=r"engine holds release 2 of birds, and is left as it is. Pull into a new"):
        pull(NAME, to=target, number=1, store=store, keys=keys)
    assert first.engine.stat().st_mtime_ns == written
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ReleaseError, match=r"other holds no whole release.*Pull into a new folder"):
        pull(NAME, to=tmp_path / "other", store=store, keys=keys)
    assert names(tmp_path / "other") == {"mine.txt"}
    with pytest.raises(ReleaseError, match=r"cannot be pulled to .*mine.txt: Not a directory"):
        pull(NAME, to=tmp_path / "other" / "mine.txt", store=store, keys=keys)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_nothing_appears_where_the_engine_is_not_the_released_one(
    store: LocalStore, tmp_path: Path, keys: Keys, damage: str
) -> None:
    """Neither the folder nor a part of it."""
    key = publish(store, a_run(store, tmp_path, "run2"), keys).engines[0].engine.key
    if damage == "changed":
        store.write_text(key, "x")
    else:
        store.delete(key)
    before = names(tmp_path)
    with pytest.raises(StoreError, match=r"is (damaged|not in)"):
        pull(NAME, to=tmp_path / "engine", store=store, keys=keys)
    assert names(tmp_path) == before


def test_nothing_is_fetched_of_a_release_that_is_not_trusted(
    store: LocalStore, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsigned, or changed after it was signed."""
    monkeypatch.setattr(LocalStore, "fetch", lambda *_: pytest.fail("something was fetched"))
    text = store.read_text(f"models/{NAME}/releases/2") or ""
    for changed in ({"signature": None}, {"run": "other"}):
        store.write_text(f"models/{NAME}/releases/2", json.dumps({**json.loads(text), **changed}))
        with pytest.raises(ReleaseError, match=r"Release 2 of birds in .* is refused"):
            pull(NAME, to=tmp_path / "engine", store=store, keys=keys)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("engine.onnx", "run2", "run3", "engine.onnx is damaged. Pull it again"),
        ("model.json", "robin", "raven", "model.json is not what the release says"),
        ("model.json", '"engine.onnx"', '"../engine.onnx"', "model.json is not what the release says"),
        ("model.json", "{", "[", "holds no whole release"),
        ("release.json", "robin", "raven", "was changed after it was signed"),
        ("release.json", '"signature": {', '"signature": null, "x": {', "is unsigned"),
        ("release.json", "{", "[", "is damaged"),
    ],
)
def test_a_pulled_folder_is_verified_without_a_store(
    store: LocalStore, tmp_path: Path, keys: Keys, file: str, old: str, new: str, message: str
) -> None:
    """Any change of any file is found, and any file that is missing."""
    folder = pull(NAME, to=tmp_path / "engine", store=store, keys=keys).folder
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(ReleaseError, match=message):
        verify_folder(folder, keys)
    (folder / file).unlink()
    with pytest.raises(ReleaseError, match="holds no whole release: No such file"):
        verify_folder(folder, keys)


PULL = """
import os, random, signal, sys, time
from pathlib import Path
from tasks.stores.loader import pull
from tasks.stores.local import LocalStore
from tasks.stores.signing import NO_KEYS
store, folder, chance = LocalStore(Path(sys.argv[1])), Path(sys.argv[2]), random.Random(1)
for turn in range(60):
    ready, tell = os.pipe()
    if (child := os.fork()) == 0:
        for step in range(1000):
            pull("birds", to=folder / f"{turn}-{step}", store=store, keys=NO_KEYS)
            os.write(tell, b".")
    os.close(tell)
    os.read(ready, 1)  # the first is through
    os.close(ready)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child has failed by itself"
"""


def test_a_pull_that_is_killed_leaves_no_half_of_a_folder(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """What has its final name is complete; what has not is hidden, and in nobody's way."""
    target = tmp_path / "pulled"
    subprocess.run([sys.executable, "-c", PULL, str(tmp_path / "store"), str(target)], check=True, timeout=600)
    folders = [folder for folder in target.iterdir() if not folder.name.startswith(".")]
    assert len(folders) >= 60
    for folder in folders:
        verify_folder(folder, keys)


def test_two_pulls_at_once_are_both_served(store: LocalStore, tmp_path: Path, keys: Keys) -> None:
    """By the folder of whoever was first."""

    class Rival(LocalStore):
        def _download(self, key: str, path: Path) -> str:
            pull(NAME, to=tmp_path / "engine", store=store, keys=keys)
            return super()._download(key, path)

    pulled = pull(NAME, to=tmp_path / "engine", store=Rival(tmp_path / "store"), keys=keys)
    assert names(pulled.folder) == FILES
    assert names(tmp_path) >= {"engine"}
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


def test_serving_needs_no_training_library(store: LocalStore, tmp_path: Path) -> None:
    """The settings say where the store is; neither PyTorch nor Prefect is loaded."""
    program = (
        "import sys; from tasks.stores.loader import pull; "
        "print(pull('birds', to='engine').signature); assert not {'torch', 'prefect', 'boto3'} & sys.modules.keys()"
    )
    environment = {"REQUANT_STORE": str(tmp_path / "store"), "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "not checked: no key is trusted here" in ended.stdout
