"""The rules that keep the rooms apart, and what must not get into the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OURS = ("flows", "tasks")
MODULES = [path.relative_to(ROOT) for top in OURS for path in sorted((ROOT / top).rglob("*.py"))]
PYTHONS = ("3.11", "3.12", "3.13")

HOMES = {
    "prefect": ("flows/*.py", "tasks/*.py"),
    "boto3": ("tasks/stores/s3.py",),
    "cryptography": ("tasks/stores/signing.py",),
    "onnxruntime": ("tasks/engines/onnxruntime.py", "tasks/scoring/memory_probe.py"),
    "tensorrt": ("tasks/engines/tensorrt_*.py",),
    "pycuda": ("tasks/engines/cuda.py",),
    "cuda": ("tasks/engines/cuda.py",),
    "pynvml": ("tasks/scoring/nvml.py",),
    "great_expectations": ("tasks/data/*.py",),
    "torchao": ("tasks/quant/*.py",),
    "matplotlib": ("tasks/report/*.py",),
    "jinja2": ("tasks/report/*.py",),
}

MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|home|Users|opt)/")
REGISTRIES = re.compile(r"\bpy(?:pi|thonhosted)\.org|download\.py[a-z]+\.org|--[a-z-]*(?:url|links)[ =]\S")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names, also of imports inside functions."""
    for node in ast.walk(ast.parse((ROOT / path).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            yield node.module or ""


def is_step(module: str) -> bool:
    """`tasks.<verb>` is a step; `tasks.<noun>` is a folder."""
    return module.startswith("tasks.") and not (ROOT / "tasks" / module.split(".")[1]).is_dir()


def layer(module: str) -> int:
    """Contracts 0, nouns 1, steps 2, flows 3."""
    if module.split(".")[0] == "flows":
        return 3
    if is_step(module):
        return 2
    return 0 if module.startswith("tasks.contracts") else 1


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield name, content.decode()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    """Flows know steps, steps know nouns, nouns know contracts, and never the other way round."""
    for module in imported_modules(path):
        if module.split(".")[0] in OURS:
            assert layer(module) <= layer(name_of(path)), f"{path} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_each_vendor_is_imported_only_at_home(path: Path) -> None:
    """A change of a vendor's interface is a change of one file."""
    for vendor in {module.split(".")[0] for module in imported_modules(path)} & HOMES.keys():
        assert any(path.match(home) for home in HOMES[vendor]), f"{vendor} belongs in {HOMES[vendor]}, not in {path}"


def test_nouns_do_not_import_one_another_in_circles() -> None:
    """Each noun can be understood with those below it."""
    below: dict[str, set[str]] = defaultdict(set)
    for path in MODULES:
        if len(path.parts) > 2:
            nouns = {module.split(".")[1] for module in imported_modules(path) if module.startswith("tasks.")}
            below[path.parts[1]] |= nouns - {path.parts[1]}
    TopologicalSorter(below).prepare()  # raises CycleError


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_package_files_are_empty(path: Path) -> None:
    """Importing one noun loads no other."""
    assert (ROOT / path).read_bytes() == b""


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without __init__.py would be missing in the wheel."""
    for path in MODULES:
        assert (ROOT / path).with_name("__init__.py").is_file(), path


def test_tests_are_no_packages() -> None:
    """A tests/tasks/__init__.py would hide the package `tasks`."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRIES], ids=["machine paths", "registries"])
def test_no_file_names_one_machine_or_registry(pattern: re.Pattern[str]) -> None:
    """Every path is relative and every registry is the reader's own choice."""
    found = {
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in tracked_texts()
        for match in pattern.finditer(text)
    }
    assert found == set()


def test_the_patterns_find_what_they_are_for() -> None:
    """A pattern that matches nothing would hold no rule."""
    for folder in ("work", "root", "home", "opt"):
        assert MACHINE_PATHS.search(f"see /{folder}/x")
        assert not MACHINE_PATHS.search(f"docs/{folder}/x and some.site/{folder}/x")
    hosts = ("pypi" + ".org/simple", "files.python" + "hosted.org", "download.py" + "torch.org/whl")
    for text in (*hosts, "--index" + "-url https://x", "--extra-index" + "-url=x", "--find" + "-links=x"):
        assert REGISTRIES.search(text)


def locked_blocks(lock: Path = ROOT / "requirements.lock") -> list[list[str]]:
    """Lines of each requirement in the lock: the pin, then its hashes and origins."""
    lines = lock.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line and not line[0].isspace() and line[0] != "#"]
    return [lines[start:end] for start, end in pairwise([*starts, len(lines)])]


def pinned(python: str) -> dict[str, str]:
    """Locked version by name, on Linux with this Python."""
    environment = {name: str(value) for name, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, str] = {}
    for block in locked_blocks():
        requirement = Requirement(block[0].removesuffix("\\").strip())
        if applies(requirement.marker, environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", block[0]
            pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def applies(marker: Marker | None, environment: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(environment)


def test_every_locked_requirement_has_hashes() -> None:
    """What is installed is what was locked, byte for byte; the lock names no registry (see above)."""
    blocks = locked_blocks()
    assert len(blocks) > 100
    assert not [line for block in blocks for line in block if line.startswith("-")]
    for block in blocks:
        hashes = [line for line in block if re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)]
        assert hashes, f"{block[0]} has no hash"


def test_every_python_gets_the_same_versions() -> None:
    """What passes lint, types and tests under one Python is what the others install."""
    names = Counter(block[0].partition("==")[0] for block in locked_blocks())
    assert [name for name, versions in names.items() if versions > 1] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_satisfies_the_project(python: str) -> None:
    """Each dependency, those of development and those of the build too, is locked to a version that it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["build-system"]["requires"],
    ]
    pins = pinned(python)
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not locked: run `make lock`"
        assert requirement.specifier.contains(version), f"{text} is locked to {version}: run `make lock`"
