"""Small images for the tests of this folder."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Photo = Callable[..., Image.Image]
WriteFolder = Callable[..., Path]


@pytest.fixture
def photo() -> Photo:
    """Smooth random colours, no two seeds alike."""

    def make(seed: int, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)

    return make


@pytest.fixture
def write_folder(tmp_path: Path, photo: Photo) -> WriteFolder:
    """A folder per class with so many PNG files each."""

    def write(counts: Mapping[str, int], *, name: str = "photos", first_seed: int = 0) -> Path:
        seed = first_seed
        for class_name, count in counts.items():
            folder = tmp_path / name / class_name
            folder.mkdir(parents=True)
            for index in range(count):
                photo(seed).save(folder / f"{index:03}.png")
                seed += 1
        return tmp_path / name

    return write


@pytest.fixture
def fashion_mnist(tmp_path: Path) -> Callable[..., Path]:
    """A root where torchvision finds a Fashion-MNIST with these labels in `train` and `t10k`, on random images."""

    def write(**halves: list[int]) -> Path:
        random = np.random.default_rng(0)
        folder = tmp_path / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        for half, labels in halves.items():
            pixels = random.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
            head = struct.pack(">IIII", 2051, len(labels), 28, 28)
            (folder / f"{half}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
            (folder / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
        return tmp_path

    return write
