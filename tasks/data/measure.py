"""What images are like: the numbers that data checks judge. Axes: N image, H row, W column, C channel, L level.

`look_at` does what needs a whole image, mostly outside the interpreter's lock; `measure` computes on many looks at
once, because numpy's fixed cost per call, inside that lock, is larger than the arithmetic on one image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from PIL import Image
from scipy.fft import dctn

PROBE = 32  # side of the centres that compressibility, correlation and sharpness look at
SMALL = 32  # the short side of the copy that all else is measured on has this many pixels, or up to twice as many
COPY = 32  # side of the grey copy that is hashed
THUMBNAIL = 16  # side of the grey copy that tells near duplicates from what merely hashes alike
_LUMA = np.array([0.299, 0.587, 0.114])
_LEVELS_L = np.arange(256.0)


@dataclass(frozen=True)
class Look:
    """What is kept of one image to measure it: some kilobytes."""

    colours: list[int]  # counts of the levels of three channels
    entropy: float
    compressibility: float
    near_HW: np.ndarray  # grey centre, in the image's own pixels
    far_HW: np.ndarray  # grey centre of the small copy
    copy: bytes  # grey, COPY x COPY
    thumbnail: bytes


def look_at(image: Image.Image) -> Look:
    """A decoded image, RGB or L. A large one is first averaged over squares, which costs little."""
    factor = min(image.size) // SMALL
    small = image.reduce(factor) if factor > 1 else image
    grey = _grey(small)
    copy = grey.resize((COPY, COPY), Image.Resampling.BOX)
    near_HW = _centre(image)
    return Look(
        colours=small.histogram() * (3 // len(small.getbands())),
        entropy=grey.entropy(),
        compressibility=len(zlib.compress(near_HW.tobytes(), 1)) / near_HW.size,
        near_HW=near_HW,
        far_HW=near_HW if small is image else _centre(grey),
        copy=copy.tobytes(),
        thumbnail=copy.reduce(COPY // THUMBNAIL).tobytes(),
    )


def measure(looks: Sequence[Look]) -> list[dict[str, float | int | bytes]]:
    """Properties of each image.

    Returns:
        mean_r, mean_g, mean_b, std_r, std_g, std_b: of each channel, in 0..255; a grey image has three equal ones.
        brightness: mean luma, in 0..1.
        entropy: of the grey levels, in bits (0..8).
        sharpness: standard deviation of the edges in the centre of the small copy, in 0..255.
        compressibility: share of bytes that zlib leaves of the centre; noise keeps all of them.
        correlation: of neighbours, in the centre or in that of the small copy if that is more: a weave looks like noise
            from near. Near 1 in photographs, near 0 in noise, and 1 in a constant image, where it is not defined.
        phash: 64 bits that similar images share (`perceptual_hashes`).
        thumbnail: a grey copy, THUMBNAIL x THUMBNAIL bytes.
    """
    means_NC, deviations_NC = _moments([look.colours for look in looks])
    near = [look.near_HW for look in looks]
    far = [look.far_HW for look in looks]
    copies_NHW = np.frombuffer(b"".join(look.copy for look in looks), np.uint8).reshape(-1, COPY, COPY)
    columns = {
        **dict(zip(("mean_r", "mean_g", "mean_b"), means_NC.T.tolist(), strict=True)),
        **dict(zip(("std_r", "std_g", "std_b"), deviations_NC.T.tolist(), strict=True)),
        "brightness": (means_NC @ _LUMA / 255).tolist(),
        "entropy": [look.entropy for look in looks],
        "sharpness": _by_shape(_sharpness, far).tolist(),
        "compressibility": [look.compressibility for look in looks],
        "correlation": np.maximum(_by_shape(_correlations, near), _by_shape(_correlations, far)).tolist(),
        "phash": perceptual_hashes(copies_NHW).tolist(),
        "thumbnail": [look.thumbnail for look in looks],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def perceptual_hashes(copies_NHW: np.ndarray) -> np.ndarray:
    """64 bits each, uint64: which of the 8 x 8 lowest frequencies of a 32 x 32 copy lie above their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1.
    """
    low_NF = dctn(copies_NHW.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    low_NF[:, 0] = 0.0  # brightness says nothing of what is seen
    hashes_N: np.ndarray = np.packbits(low_NF > np.median(low_NF, axis=1, keepdims=True), axis=1).view(">u8")[:, 0]
    return hashes_N


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else image.convert("L")


def _centre(image: Image.Image) -> np.ndarray:
    width, height = min(PROBE, image.width), min(PROBE, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    grey = _grey(image.crop((left, top, left + width, top + height)))
    return np.frombuffer(grey.tobytes(), np.uint8).reshape(height, width)


def _moments(counts: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of counted levels, [N, C]. Sums of whole numbers: exact."""
    counts_NCL = np.fromiter(chain.from_iterable(counts), np.float64).reshape(-1, 3, 256)
    total_NC = counts_NCL.sum(2)
    means_NC = counts_NCL @ _LEVELS_L / total_NC
    variances_NC = counts_NCL @ _LEVELS_L**2 / total_NC - means_NC**2
    return means_NC, np.sqrt(np.maximum(variances_NC, 0))


def _by_shape(compute: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]) -> np.ndarray:
    """A number for each image, computed at once for those of one shape: float32 [N, H, W] goes in, [N] comes out."""
    values_N = np.empty(len(images))
    shapes = [image.shape for image in images]
    for shape in set(shapes):
        rows = [row for row, found in enumerate(shapes) if found == shape]
        values_N[rows] = compute(np.stack([images[row] for row in rows]).astype(np.float32))
    return values_N


def _sharpness(pixels_NHW: np.ndarray) -> np.ndarray:
    """Deviation of what Pillow's FIND_EDGES gives: eight times a pixel minus its eight neighbours, in 0..255."""
    if min(pixels_NHW.shape[1:]) < 3:
        return np.zeros(len(pixels_NHW))
    sums_NHW = pixels_NHW[:, :-2] + pixels_NHW[:, 1:-1] + pixels_NHW[:, 2:]
    sums_NHW = sums_NHW[:, :, :-2] + sums_NHW[:, :, 1:-1] + sums_NHW[:, :, 2:]
    deviations_N: np.ndarray = (9 * pixels_NHW[:, 1:-1, 1:-1] - sums_NHW).clip(0, 255).std((1, 2))
    return deviations_N


def _correlations(pixels_NHW: np.ndarray) -> np.ndarray:
    """Of each image: one minus half the mean squared step between neighbours, in units of the variance."""
    variance_N = pixels_NHW.var((1, 2))
    steps = [np.diff(pixels_NHW, axis=axis) for axis in (1, 2)]
    count = sum(step[0].size for step in steps)
    squares_N = sum(np.square(step).sum((1, 2)) for step in steps)
    varied_N = variance_N > 0
    return np.where(varied_N, 1 - squares_N / np.where(varied_N, 2 * variance_N * count, 1), 1.0)
