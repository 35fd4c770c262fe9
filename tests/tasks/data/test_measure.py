from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from tasks.data.measure import THUMBNAIL, look_at, measure
from tasks.data.sources import memory_of

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def hamming(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def measure_image(image: Image.Image) -> dict[str, Any]:
    return {name: value for name, (value,) in measure([look_at(image, memory_of(image))]).items()}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("photo", PHOTOS, ids=["temple", "flower"])
def test_colours_are_those_of_the_pixels(photo: Image.Image) -> None:
    """Averaging over squares keeps the means; deviations lose only what is finer than the squares."""
    found = measure_image(photo)
    pixels_NC = np.asarray(photo, np.float64).reshape(-1, 3)
    for channel, name in enumerate("rgb"):
        assert found[f"mean_{name}"] == pytest.approx(pixels_NC[:, channel].mean(), abs=1.5)
        assert 0.7 < float(found[f"std_{name}"]) / pixels_NC[:, channel].std() <= 1.01
    assert found["brightness"] == pytest.approx(float(pixels_NC.mean(0) @ [0.299, 0.587, 0.114]) / 255, abs=0.01)
    grey = measure_image(photo.convert("L"))
    assert found["std_luma"] == pytest.approx(grey["std_luma"], rel=0.01)


def test_grey_images_have_three_equal_channels() -> None:
    """So one table holds grey and colour."""
    found = measure_image(PHOTOS[0].convert("L"))
    assert found["mean_r"] == found["mean_g"] == found["mean_b"]
    assert found["std_r"] == found["std_g"] == found["std_b"] == found["std_luma"]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (300, 200), (1000, 700)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_noise_is_unlike_any_photo(mode: str, size: tuple[int, int]) -> None:
    """Neighbours know nothing of one another, whatever the size."""
    found = measure_image(noise(*size, mode))
    photo = measure_image(PHOTOS[1].resize(size).convert(mode))
    assert abs(float(found["correlation"])) < 0.1
    assert float(photo["correlation"]) > 0.5
    assert float(found["compressibility"]) > 0.9


def test_constant_images_say_so() -> None:
    """No entropy, no edges, no deviation, and nothing is undefined."""
    for colour in ((0, 0, 0), (255, 255, 255), (12, 200, 99)):
        found = measure_image(Image.new("RGB", (90, 70), colour))
        assert found["entropy"] == found["sharpness"] == found["std_r"] == 0
        assert found["correlation"] == 1
        assert float(found["compressibility"]) < 0.05


def test_blur_is_seen() -> None:
    """Sharpness falls with every blur."""
    values = [measure_image(PHOTOS[0].filter(ImageFilter.GaussianBlur(radius)))["sharpness"] for radius in (0, 8, 30)]
    assert float(values[0]) > 1.3 * float(values[1]) > 1.3 * float(values[2])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3000, 1)])
def test_images_of_any_shape_are_measured(size: tuple[int, int]) -> None:
    """Every number is finite."""
    found = measure_image(noise(*size))
    numbers = [value for value in found.values() if not isinstance(value, bytes)]
    assert np.isfinite(numbers).all()
    assert len(found["thumbnail"]) == THUMBNAIL**2


@pytest.mark.parametrize("scale", [0.3, 0.43, 0.7, 0.95, 1.7])
def test_near_duplicates_share_their_hash(scale: float) -> None:
    """The same photo in another size, compressed or brighter is within four bits; another photo is far."""
    flower, temple = PHOTOS
    buffer = io.BytesIO()
    flower.save(buffer, "JPEG", quality=40)
    twins = [
        flower.resize((round(flower.width * scale), round(flower.height * scale)), Image.Resampling.BICUBIC),
        Image.open(buffer),
        flower.point(lambda value: value * 0.8),
    ]
    mine, other, *theirs = (measure_image(each)["phash"] for each in (flower, temple, *twins))
    assert max(hamming(mine, twin) for twin in theirs) <= 4
    assert hamming(mine, other) > 16


def test_images_are_measured_alike_alone_and_together() -> None:
    """Whatever shapes and modes come in one batch."""
    images = [
        *PHOTOS,
        noise(5, 9),
        PHOTOS[0].convert("L"),
        noise(48, 40),
        noise(1, 3),
        PHOTOS[1].rotate(90, expand=True),
    ]
    together = measure([look_at(image, memory_of(image)) for image in images])
    for row, image in enumerate(images):
        found = {name: values[row] for name, values in together.items()}
        alone = measure_image(image)
        assert (found.pop("phash"), found.pop("thumbnail")) == (alone.pop("phash"), alone.pop("thumbnail"))
        assert found == pytest.approx(alone, rel=1e-5)
    assert not any(measure([]).values())


def test_sharpness_is_of_the_edges_that_pillow_finds() -> None:
    """In the centre. The border, which Pillow leaves as it is, does not count."""
    grey = PHOTOS[0].resize((60, 50)).convert("L")  # too small to be averaged first
    edges_HW = np.asarray(grey.crop((14, 9, 46, 41)).filter(ImageFilter.FIND_EDGES))[1:-1, 1:-1]
    assert measure_image(grey)["sharpness"] == pytest.approx(edges_HW.std(), rel=1e-5)
