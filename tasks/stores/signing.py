"""Signatures of releases: Ed25519 over canonical JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.contracts.errors import ReleaseError
from tasks.contracts.release import Signature
from tasks.contracts.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Who signs here, and whose signatures count here."""

    signer: Ed25519PrivateKey | None = field(default=None, repr=False)
    trusted: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)


NO_KEYS = Keys()


def keys_from(settings: Settings) -> Keys:
    """The keys that the settings name.

    Raises:
        ReleaseError: if a file cannot be read or holds another kind of key. Its name and content are not repeated, as a
            key itself may stand where its path should.
    """
    signer = None
    if settings.signing_key is not None:
        pem = _read(settings.signing_key, "REQUANT_SIGNING_KEY", "private")
        with suppress(ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
            key = serialization.load_pem_private_key(pem, password=None)
            signer = key if isinstance(key, Ed25519PrivateKey) else None
        if signer is None:
            raise _wrong("REQUANT_SIGNING_KEY", "private")
    public = [_public(path) for path in settings.trusted_keys]
    return Keys(signer=signer, trusted={key_id(key): key for key in public})


def key_id(key: Ed25519PublicKey) -> str:
    """Short name of a key: the beginning of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def signed(document: Mapping[str, Any], signer: Ed25519PrivateKey | None) -> dict[str, Any]:
    """The document with its signature, or with null in its place."""
    if signer is None:
        return {**document, "signature": None}
    signature = Signature(key_id=key_id(signer.public_key()), value=signer.sign(_canonical(document)).hex())
    return {**document, "signature": signature.model_dump()}


def check_signature(document: Mapping[str, Any], trusted: Mapping[str, Ed25519PublicKey]) -> str:
    """What is to be said of who signed it.

    Raises:
        ReleaseError: if keys are trusted, and none of them has signed exactly this document.
    """
    found = document.get("signature")
    signature = None if found is None else Signature.model_validate(found)
    if not trusted:
        return "unsigned" if signature is None else f"signed by {signature.key_id}, not checked: no key is trusted here"
    if signature is None:
        raise ReleaseError("It is unsigned.", remedy="Release it where REQUANT_SIGNING_KEY is set.")
    key = trusted.get(signature.key_id)
    if key is None:
        raise ReleaseError(
            f"It is signed by {signature.key_id}, a key that is not trusted here.",
            remedy="If that key is good, add its public half to REQUANT_TRUSTED_KEYS.",
        )
    try:
        key.verify(bytes.fromhex(signature.value), _canonical(document))
    except (InvalidSignature, ValueError):
        raise ReleaseError(
            f"Its signature by {signature.key_id} is wrong: it was changed after it was signed.",
            remedy="Do not use it, and find out who wrote it.",
        ) from None
    return f"signed by {signature.key_id}, which is trusted"


def write_key_pair(path: Path) -> tuple[Path, str]:
    """Make a key pair: the private half at `path`, readable by its owner alone; also the public half's path and id.

    Raises:
        ReleaseError: if one of the files is there already, or cannot be written.
    """
    public_path = path.with_name(f"{path.name}.pub")
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if public_path.exists():  # before the private half is written, which would then be alone
        raise ReleaseError(f"{public_path} is there already.", remedy="Name a new file.")
    for target, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        except OSError as error:
            raise ReleaseError(
                f"{target} cannot be written: {error.strerror}.", remedy="Name a new file in a folder that is there."
            ) from error
    return public_path, key_id(key.public_key())


def _canonical(document: Mapping[str, Any]) -> bytes:
    """All fields but the signature. Of the JSON itself, so that fields added to later releases change no old one."""
    payload = {name: value for name, value in document.items() if name != "signature"}
    return json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()


def _public(path: Path) -> Ed25519PublicKey:
    pem = _read(path, "REQUANT_TRUSTED_KEYS", "public")
    with suppress(ValueError, UnsupportedAlgorithm):
        key = serialization.load_pem_public_key(pem)
        if isinstance(key, Ed25519PublicKey):
            return key
    raise _wrong("REQUANT_TRUSTED_KEYS", "public")


def _read(path: Path, variable: str, half: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        raise ReleaseError(
            f"A {half} key that {variable} names cannot be read: {reason}.",
            remedy="Set it to a PEM file; `requant keygen` makes one.",
        ) from None


def _wrong(variable: str, half: str) -> ReleaseError:
    return ReleaseError(
        f"{variable} names a file that holds no {half} Ed25519 key in PEM form without a password.",
        remedy="`requant keygen` makes one.",
    )
