from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.contracts.errors import ReleaseError
from tasks.contracts.settings import Settings
from tasks.stores.signing import Keys, check_signature, keys_from, signed, write_key_pair

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    private = tmp_path / "key.pem"
    return private, write_key_pair(private)[0]


def test_a_pair_signs_and_is_trusted(pair: tuple[Path, Path]) -> None:
    """Through the settings alone; the id is the one that was told."""
    keys = keys_from(Settings(signing_key=pair[0], trusted_keys=(pair[1],)))
    document = signed({"a": 1, "b": [math.nan, "ä", None]}, keys.signer)
    (trusted,) = keys.trusted
    assert document["signature"]["key_id"] == trusted
    assert check_signature(document, keys.trusted) == f"signed by {trusted}, which is trusted"


def test_the_form_of_the_json_does_not_count(pair: tuple[Path, Path]) -> None:
    """Order, white space and escapes; fields that a later version would add do."""
    keys = keys_from(Settings(signing_key=pair[0], trusted_keys=(pair[1],)))
    document = signed({"a": 1.50, "b": {"y": "ä", "x": 2}}, keys.signer)
    rewritten = json.loads(json.dumps(dict(reversed(document.items())), indent=3, ensure_ascii=False))
    assert check_signature(rewritten, keys.trusted)
    with pytest.raises(ReleaseError, match="was changed after it was signed"):
        check_signature({**document, "c": None}, keys.trusted)


def test_the_private_key_is_its_owners_alone_and_never_written_over(pair: tuple[Path, Path]) -> None:
    """Neither half is, whichever is there."""
    private, public = pair
    content = private.read_bytes()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    with pytest.raises(ReleaseError, match=r"key.pem.pub is there already"):
        write_key_pair(private)
    public.unlink()
    with pytest.raises(ReleaseError, match=r"key.pem cannot be written: File exists"):
        write_key_pair(private)
    assert private.read_bytes() == content
    assert not public.exists()
    with pytest.raises(ReleaseError, match=r"No such file or directory. Name a new file in a folder that is there"):
        write_key_pair(private.parent / "nowhere" / "key.pem")


@pytest.mark.parametrize("half", ["signing_key", "trusted_keys"])
def test_what_is_no_key_is_refused_without_repeating_it(half: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Files of other kinds, the wrong half, keys with a password, and a key itself in place of its path."""
    private, public = pair
    secret = private.read_text()
    wrong = {
        "text": b"not a key",
        "other kind": ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, serialization.NoEncryption()),
        "other half": (public if half == "signing_key" else private).read_bytes(),
        "password": Ed25519PrivateKey.generate().private_bytes(
            PEM, PKCS8, serialization.BestAvailableEncryption(b"hush")
        ),
    }
    paths = [tmp_path / "none.pem", tmp_path, Path(secret), Path("a\0b")]
    for name, content in wrong.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    for path in paths:
        settings = Settings(signing_key=path) if half == "signing_key" else Settings(trusted_keys=(path,))
        with pytest.raises(ReleaseError, match=rf"REQUANT_{half.upper()} names") as caught:
            keys_from(settings)
        assert "requant keygen" in caught.value.remedy
        assert secret.splitlines()[1] not in str(caught.value)
        assert str(path) not in str(caught.value)


def test_trusted_keys_are_a_list_of_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined as in PATH."""
    monkeypatch.setenv("REQUANT_TRUSTED_KEYS", "a.pub:b.pub:")
    assert Settings().trusted_keys == (Path("a.pub"), Path("b.pub"))
    monkeypatch.setenv("REQUANT_TRUSTED_KEYS", "")
    assert Settings().trusted_keys == ()


def test_a_private_key_is_not_shown(keys: Keys) -> None:
    """Not where the keys are printed."""
    assert "Private" not in repr(keys)
