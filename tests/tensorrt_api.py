"""TensorRT's real Python API on a machine without TensorRT: NVIDIA's bindings, with empty libraries beside them.

Names, enums, signatures and base classes are genuine; nothing can be built or run, as every factory gives null. The
wheels (1 MB each) come from the registry that pip is set to, are held to their digests and are kept in a cache folder.

    eval "$(python -m tests.tensorrt_api 11.4.0.106)"   # then python imports tensorrt, and mypy knows its types
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

CACHE = Path.home() / ".cache/requant/tensorrt-api"
PACKAGES = {"10.16.1.11": "tensorrt-cu12-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}
DIGESTS = {  # of the wheels for Linux on x86-64, Python 3.11 to 3.13
    "10.16.1.11": (
        "150ef2b672487e29a8ea916353467c3e199994fb33589167e3641a928e243aa7",
        "8e339335e7255b3fb3954eca61b4acbbdfcf7b28505bd711914519647ba310c8",
        "f2a08cedfa48e300720e5bed070a45e390ea67dbcf475ffce725d10e0a2b3ba7",
    ),
    "11.4.0.106": (
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
        "5fc7a6c412881f7212030893bd5531b1a0ff415c72c7678dfe4ead7a7765b38d",
        "bac9a362c9189b5f5dd0444213913846e4b46003237834958e890eff57d86ed5",
    ),
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FACTORIES = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getInferLibVersion", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
# Two signatures that the generator cannot write: a default before a parameter without one, and a type of C++.
MENDED = {
    "channel_axis: typing.SupportsInt) -> IScaleLayer": "channel_axis: typing.SupportsInt = ...) -> IScaleLayer",
    "def get_error(self, *args, **kwargs): ...": "def get_error(self, index: typing.SupportsInt) -> ParserError: ...",
}


class NoApiError(Exception):
    """The API cannot be had on this machine. The message says why."""


@dataclass(frozen=True)
class Api:
    """One version, unpacked."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to import it, and mypy to know it."""
        return {
            "PYTHONPATH": str(self.folder / "site"),
            "LD_LIBRARY_PATH": str(self.folder / "lib"),
            "MYPYPATH": str(self.folder / "stubs"),
        }


def tensorrt_api(version: str) -> Api:
    """Downloaded and unpacked once.

    Raises:
        NoApiError: without the wheel or a C compiler.
    """
    target = CACHE / f"{version}-{sys.implementation.cache_tag}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            _make(Path(made) / "api", version)
            with suppress(OSError):  # another process was quicker
                (Path(made) / "api").rename(target)
    return Api(target)


def _make(folder: Path, version: str) -> None:
    site, lib, stubs = folder / "site", folder / "lib", folder / "stubs/tensorrt"
    for made in (site / "tensorrt", lib, stubs):
        made.mkdir(parents=True)
    wanted = folder / "wanted.txt"
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in DIGESTS[version])
    wanted.write_text(f"{PACKAGES[version]}=={version} {hashes}\n")
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
        "-r", str(wanted), "-d", str(folder),
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    # As in the complete package, `import tensorrt` gives what the bindings hold.
    (site / "tensorrt/__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FACTORIES))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        _run("cc", "-shared", "-fPIC", "-o", str(lib / name), str(source), f"-Wl,-soname,{name}")
    generate = "import sys; from mypy.stubgen import main; main(sys.argv[1:])"
    arguments = ("--inspect-mode", "-m", "tensorrt_bindings.tensorrt", "-o", str(folder))
    subprocess.run(
        [sys.executable, "-c", generate, *arguments], check=True, capture_output=True,
        env=os.environ | Api(folder).environment,
    )  # fmt: skip
    text = (folder / "tensorrt_bindings/tensorrt.pyi").read_text() + "\n__version__: str\n"
    for wrong, right in MENDED.items():
        text = text.replace(wrong, right)
    (stubs / "__init__.pyi").write_text(text)


def _run(*command: str) -> None:
    """What may be missing on a machine."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoApiError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise NoApiError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout).strip()[-300:]}")


if __name__ == "__main__":
    for name, value in tensorrt_api(sys.argv[1]).environment.items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - for the shell
