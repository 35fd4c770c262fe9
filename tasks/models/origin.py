"""Where weights and architecture come from, and digests of both. PyTorch, slow to load, is not needed."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tasks.contracts.errors import ModelError
from tasks.stores.base import sha256_of
from tasks.stores.mirror import is_remote, listing_digest, local_file
from tasks.stores.steps import code_digest, library_versions

TORCHVISION = "torchvision"


def weights_file(weights: str) -> Path | None:
    """The file that `weights` names, or None if it is the name of torchvision weights. One in S3 is copied first.

    Raises:
        ModelError: if it is a URL of another kind than file:// and s3://.
        StoreError: if S3 cannot be read.
    """
    if is_remote(weights):
        return local_file(weights)
    parts = urlsplit(weights)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if "://" in weights:
        raise ModelError(f"{weights} is not loaded from there.", remedy="Download it and give the file.")
    path = Path(weights).expanduser()
    return None if weights.isidentifier() and not path.is_file() else path


def weights_digest(weights: str) -> str:
    """What decides the weights: the file's sha256, or the name and version of torchvision's.

    Raises:
        ModelError: if the file cannot be read.
    """
    path = weights_file(weights)
    if path is None:
        return hashlib.sha256(
            f"{TORCHVISION} {library_versions(TORCHVISION)[TORCHVISION]} {weights}".encode()
        ).hexdigest()
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def weights_state(weights: str) -> str:
    """Like `weights_digest`; of an object in S3 its ETag and size, so that it need not be fetched."""
    return listing_digest(weights) if is_remote(weights) else weights_digest(weights)


def architecture_digest(architecture: str) -> str:
    """What decides the model's code: torchvision's version, or a digest of the factory's source.

    The source is that of the module and all it imports from the folder that holds it. The module is not executed.

    Raises:
        ModelError: if there is no such module, or it has no source.
    """
    home, _, _ = architecture.partition(":")
    if home == TORCHVISION:
        return f"{TORCHVISION} {library_versions(TORCHVISION)[TORCHVISION]}"
    here = working_folder_on_path()
    try:
        found = find_spec(home)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or Path(found.origin).suffix != ".py":
        raise ModelError(
            f"Module {home} has no Python source.",
            remedy=f"Put the factory into a .py file that is installed, or in the folder where you start (now {here}).",
        )
    file = Path(found.origin).resolve()
    return code_digest(home, sources=file.parents[home.count(".") + (file.name == "__init__.py")])


def working_folder_on_path() -> str:
    """Modules are found as `python -m` finds them: the working folder counts, behind everything installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return here


def unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"Weights {path}: {error.strerror or error}.", remedy="Set model.weights to a file that exists.")
