"""The wheel that users install, tried in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import sys
from importlib import import_module
from importlib.metadata import files

BLOCKED = ("tensorrt", "pycuda", "cuda", "openvino", "ai_edge_litert", "pytest", "hypothesis", "mypy_boto3_s3")
GPU = ("cuda", "tensorrt_api", "tensorrt_builder", "tensorrt_session")  # of tasks.engines, for GPU machines
sys.modules.update(dict.fromkeys(BLOCKED))
modules = [path.with_suffix("").parts for path in files("requant") if path.suffix == ".py"]
for parts in sorted(modules):
    if parts[:2] == ("tasks", "engines") and parts[-1] in GPU:
        continue
    module = import_module(".".join(part for part in parts if part != "__init__"))
    assert module.__file__.startswith(sys.prefix), module.__file__
print(len(modules))
"""


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    completed = subprocess.run(
        command, cwd=folder, env=environment | {"HOME": str(folder)}, capture_output=True, text=True, timeout=180
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


def sources() -> list[str]:
    """Files of the repository that the wheel is made of."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "flows", "tasks"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves files in the tree."""
    copy = tmp_path_factory.mktemp("copy")
    for name in [*sources(), "pyproject.toml", "README.md", "LICENSE"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", ".",
        folder=copy,
    )  # fmt: skip
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and, from the current one, its dependencies."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    current = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(current + "\n")  # its own .pth files are not read: no editable install
    run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel,
        folder=folder,
    )  # fmt: skip
    return folder / "bin"


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    """Code and templates alike, the licence too, and nothing of the tests."""
    names = zipfile.ZipFile(wheel).namelist()
    assert set(sources()) <= set(names)
    assert {name.split("/")[0] for name in names} == {"flows", "tasks", wheel.name.split("-py3")[0] + ".dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_imports_without_extras(installed: Path, tmp_path: Path) -> None:
    """From an empty folder and without runtimes or development tools that are not required."""
    count = run(installed / "python", "-c", IMPORT_ALL, folder=tmp_path)
    assert int(count) == len([name for name in sources() if name.endswith(".py")])


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    """`requant --help` works anywhere."""
    assert "requant" in run(installed / "requant", "--help", folder=tmp_path).lower()


def test_a_machine_is_started_from_a_checkout_alone(installed: Path, tmp_path: Path) -> None:
    """What it needs is not in the wheel: it is refused, and nothing is made."""
    refused = subprocess.run([installed / "requant", "up"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Start from a checkout of requant" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
