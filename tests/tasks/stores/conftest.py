from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.stores.base import Store, open_store
from tasks.stores.signing import Keys, key_id


@pytest.fixture(params=["local", "s3"])
def either_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture
def either(either_url: str) -> Store:
    return open_store(either_url)


@pytest.fixture(scope="session")
def keys() -> Keys:
    """One pair, that signs and is trusted."""
    signer = Ed25519PrivateKey.generate()
    return Keys(signer=signer, trusted={key_id(signer.public_key()): signer.public_key()})
