"""What makes a second identical run redo nothing: records of steps, under a key made of all that decides the result."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.contracts.records import ArtifactRef
from tasks.stores.base import Store

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
R = TypeVar("R", bound=BaseModel)

SOURCES = Path(__file__).resolve().parents[2]  # holds tasks/ and flows/, in a checkout as in an installation


def step_key(step: str, inputs: Mapping[str, JSON]) -> str:
    """Digest of the step's name and inputs. The order of keys does not count."""
    canonical = json.dumps([step, inputs], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def once(
    store: Store,
    step: str,
    inputs: Mapping[str, JSON],
    record_type: type[R],
    compute: Callable[[], R],
    *,
    redo: bool = False,
) -> tuple[R, bool]:
    """The step's record, and True if it was found rather than computed.

    A found record is trusted only if every artifact that it names is still there in full size. The inputs are kept
    beside the record, to see by which of them two runs differ. `redo` computes in any case.
    """
    key = f"steps/{step}/{step_key(step, inputs)}.json"
    found = None if redo else _stored(store.read_text(key), record_type)
    if found is not None and all(store.renew(ref) for ref in refs_in(found)):
        return found, True
    record = compute()
    document = {"step": step, "inputs": inputs, "record": json.loads(record.model_dump_json())}
    store.write_text(key, json.dumps(document, indent=1))
    return record, False


def refs_in(value: object) -> Iterator[ArtifactRef]:
    """Every artifact that a record names, at any depth."""
    if isinstance(value, ArtifactRef):
        yield value
    elif isinstance(value, BaseModel):
        for _, field in value:
            yield from refs_in(field)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from refs_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from refs_in(item)


def code_digest(module: str, *, sources: Path = SOURCES) -> str:
    """Digest of the source of `module` and of all modules below `sources` that it imports, directly or not.

    Imports are read from the syntax tree, also inside functions, and nothing is executed. So a change of code changes
    the key of exactly the steps that depend on it.

    Raises:
        ModuleNotFoundError: if there is no such module below `sources`.
    """
    return _reach(module, sources).digest


def imports_of(module: str, *, sources: Path = SOURCES) -> frozenset[str]:
    """Names, up to the first dot, of all that these modules import from elsewhere."""
    return _reach(module, sources).outside


class _Reach(NamedTuple):
    digest: str
    outside: frozenset[str]


@cache
def _reach(module: str, sources: Path) -> _Reach:
    """What a module rests on. Cached: source does not change under a running process."""
    if _file_of(module, sources) is None:
        raise ModuleNotFoundError(f"No module {module!r} in {sources}.", name=module)
    seen: dict[str, bytes] = {}
    outside: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name, sources)
        if path is None:
            outside.add(name.partition(".")[0])
        elif name not in seen:
            seen[name] = path.read_bytes()
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting.extend(_imports(seen[name], package))
    digests = {name: hashlib.sha256(seen[name]).hexdigest() for name in sorted(seen)}
    ours = {name.partition(".")[0] for name in seen}  # a name in one of our modules looks like a module of its own
    return _Reach(hashlib.sha256(json.dumps(digests).encode()).hexdigest(), frozenset(outside - ours))


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in names}


def installed_versions(*names: str) -> dict[str, str]:
    """The same of those that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _stored(text: str | None, record_type: type[R]) -> R | None:
    """The record in a stored document; None if there is none or it is not of this type."""
    if text is None:
        return None
    try:
        return record_type.model_validate_json(json.dumps(json.loads(text)["record"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError):
        return None  # edited by hand or written by other code: computing it again mends it


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules: `from a import b` means a, and a.b if that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _file_of(module: str, sources: Path) -> Path | None:
    base = sources.joinpath(*module.split("."))
    candidates = (base / "__init__.py", base.with_name(f"{base.name}.py"))
    return next((path for path in candidates if path.is_file()), None)
