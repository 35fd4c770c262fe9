"""What one image is like: the numbers that data checks judge. Axes: H row, W column, C channel."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageFilter
from scipy.fft import dctn

PROBE = 64  # side of the centre that compressibility and correlation look at, in the image's own pixels
SMALL = 64  # the short side of the copy that all else is measured on has this many pixels, or up to twice as many
THUMBNAIL = 16  # side of the grey copy that tells near duplicates from what merely hashes alike
_LUMA = np.array([0.299, 0.587, 0.114])


def measure_image(image: Image.Image) -> dict[str, float | int | bytes]:
    """Properties of a decoded image, RGB or L. A large image is first averaged over squares, which costs little.

    Returns:
        mean_r, mean_g, mean_b, std_r, std_g, std_b: of each channel, in 0..255; a grey image has three equal ones.
        brightness: mean luma, in 0..1.
        entropy: of the grey levels, in bits (0..8).
        sharpness: standard deviation of the edges, in 0..255.
        compressibility: share of bytes that zlib leaves of the centre; noise keeps all of them.
        correlation: of neighbours, in the centre or in the whole if that is more: a weave looks like noise from near.
            Near 1 in photographs, near 0 in noise, and 1 in a constant image, where it is not defined.
        phash: 64 bits that similar images share (`perceptual_hash`).
        thumbnail: a grey copy, THUMBNAIL x THUMBNAIL bytes.
    """
    factor = min(image.size) // SMALL
    small = image.reduce(factor) if factor > 1 else image
    grey = small if small.mode == "L" else small.convert("L")
    values_NC = np.asarray(small, np.float32).reshape(small.width * small.height, -1)
    means_C, deviations_C = (np.broadcast_to(part, 3) for part in (values_NC.mean(0), values_NC.std(0)))
    edges_HW = np.asarray(grey.filter(ImageFilter.FIND_EDGES))[1:-1, 1:-1]
    centre_HW = np.asarray(_centre(image))
    return {
        **dict(zip(("mean_r", "mean_g", "mean_b"), means_C.tolist(), strict=True)),
        **dict(zip(("std_r", "std_g", "std_b"), deviations_C.tolist(), strict=True)),
        "brightness": float(means_C @ _LUMA / 255),
        "entropy": float(grey.entropy()),
        "sharpness": float(edges_HW.std()) if edges_HW.size else 0.0,
        "compressibility": len(zlib.compress(centre_HW.tobytes(), 1)) / centre_HW.size,
        "correlation": max(_correlation(centre_HW), _correlation(np.asarray(grey))),
        "phash": perceptual_hash(grey),
        "thumbnail": grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes(),
    }


def perceptual_hash(grey: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of a 32 x 32 copy lie above their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1.
    """
    copy_HW = np.asarray(grey.resize((32, 32), Image.Resampling.BOX), np.float32)
    low = dctn(copy_HW)[:8, :8].ravel()
    low[0] = 0.0  # brightness says nothing of what is seen
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _centre(image: Image.Image) -> Image.Image:
    width, height = min(PROBE, image.width), min(PROBE, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    centre = image.crop((left, top, left + width, top + height))
    return centre if centre.mode == "L" else centre.convert("L")


def _correlation(pixels_HW: np.ndarray) -> float:
    """One minus half the mean squared step between neighbours, in units of the variance."""
    pixels_HW = pixels_HW.astype(np.float32)
    variance = float(pixels_HW.var())
    if variance == 0:
        return 1.0
    steps = [np.diff(pixels_HW, axis=axis).ravel() for axis in (0, 1)]
    count = sum(step.size for step in steps)
    return 1.0 - sum(float(step @ step) for step in steps) / (2 * variance * count)
