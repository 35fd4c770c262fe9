"""How production gets an engine: a folder with the engine, what serving needs to know, and the signed release.

from tasks.stores.loader import pull

pulled = pull("birds", to="engine")
options = onnxruntime.SessionOptions()
for key, value in pulled.model.options.items():
    if "." in key:  # the session's configuration, which the engine was judged with
        options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession(pulled.engine, options)
labels = pulled.model.serving.labels
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.contracts.errors import ReleaseError
from tasks.contracts.records import EngineRecord
from tasks.contracts.release import ModelFile, Release
from tasks.contracts.settings import Settings
from tasks.stores.base import Store, open_store, sha256_of
from tasks.stores.registry import Found, champion, parse_release, read_release
from tasks.stores.signing import Keys, keys_from


@dataclass(frozen=True)
class Pulled:
    """A verified engine on this machine."""

    folder: Path
    engine: Path
    model: ModelFile
    release: Release
    signature: str  # what is to be said of it


def pull(
    name: str,
    *,
    to: str | Path,
    number: int | None = None,
    hardware: str | None = None,
    store: Store | None = None,
    keys: Keys | None = None,
) -> Pulled:
    """Fetch the champion, or the release `number`, into the new folder `to`, which appears whole or not at all.

    A folder that holds this very engine already is checked and left as it is.

    Args:
        hardware: part of the name of what the engine was built for; needed where a release has several.
        store: that of REQUANT_STORE if not given.
        keys: those of REQUANT_TRUSTED_KEYS if not given.

    Raises:
        ReleaseError: if there is no such release or engine, it is not to be trusted, or `to` holds something else.
        StoreError: if storage misbehaves or an artifact is damaged.
    """
    store = open_store(Settings().store) if store is None else store
    keys = keys_from(Settings()) if keys is None else keys
    if number is None and (number := champion(store, name).release) is None:
        raise ReleaseError(f"{name} has no champion in {store}.", remedy="Promote a release, or name one.")
    found = read_release(store, name, number, keys)
    engine = _engine_for(found.release, hardware)
    target = Path(to).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_dir() and any(target.iterdir())):
            _fill(target, store, found, engine)
    except OSError as error:
        raise ReleaseError(
            f"{name} cannot be pulled to {target}: {error.strerror}.", remedy="Check the room and the rights there."
        ) from error
    pulled = verify_folder(target, keys)
    if (pulled.model, pulled.release) != (_model_file(found.release, engine), found.release):
        raise ReleaseError(
            f"{target} holds release {pulled.release.number} of {pulled.release.model}, and is left as it is.",
            remedy="Pull into a new folder, and let a link lead there.",
        )
    return pulled


def verify_folder(folder: Path, keys: Keys) -> Pulled:
    """A pulled folder, checked without a store: the signature, the engine's digest, and that both fit `model.json`.

    Raises:
        ReleaseError: if anything is missing, was changed, or is not signed as `keys` demand.
    """
    try:
        found = parse_release((folder / "release.json").read_text(encoding="utf-8"), f"The release in {folder}", keys)
        said = ModelFile.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
        for engine in found.release.engines:
            if said == _model_file(found.release, engine):
                if sha256_of(folder / said.engine) != engine.engine.sha256:
                    raise ReleaseError(f"{folder / said.engine} is damaged.", remedy="Pull it again.")
                return Pulled(folder, folder / said.engine, said, found.release, found.signature)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its files are not what was pulled"
        raise ReleaseError(f"{folder} holds no whole release: {reason}.", remedy="Pull into a new folder.") from error
    raise ReleaseError(f"{folder / 'model.json'} is not what the release says.", remedy="Pull into a new folder.")


def _engine_for(release: Release, hardware: str | None) -> EngineRecord:
    fitting = [one for one in release.engines if hardware is None or hardware.lower() in one.hardware.lower()]
    if len(fitting) != 1:
        raise ReleaseError(
            f"Release {release.number} of {release.model} has {len(fitting)} engines for {hardware or 'any hardware'}; "
            f"it has {_listed([engine.hardware for engine in release.engines])}.",
            remedy="Name one with --hardware.",
        )
    return fitting[0]


def _fill(target: Path, store: Store, found: Found, engine: EngineRecord) -> None:
    model = _model_file(found.release, engine)
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as outer:
        folder = Path(outer) / target.name
        store.fetch(engine.engine, folder).rename(folder / model.engine)
        (folder / "model.json").write_text(model.model_dump_json(indent=1), encoding="utf-8")
        (folder / "release.json").write_text(found.text, encoding="utf-8")
        for path in folder.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # otherwise a power cut may leave names without bytes
        try:
            folder.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first: see what it left
                raise


def _model_file(release: Release, engine: EngineRecord) -> ModelFile:
    return ModelFile(
        model=release.model,
        release=release.number,
        engine=f"engine{Path(engine.engine.key).suffix}",
        runtime=engine.runtime,
        runtime_version=engine.version,
        options=engine.options,
        hardware=engine.hardware,
        serving=release.serving,
        plan=engine.plan,
    )


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names) or "none"
